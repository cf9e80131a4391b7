// The timeline: simulated passes as cells, a row for each rank, and measured ones under them on the same axis.
import { number } from "./text.js";
import { html, svg, label, linear, ticks, redraw, panel, legend, scrolling } from "./dom.js";
import { say, naming, describeAxis, describeEvent, describePass } from "./pipelines_words.js";

const LANE = 22;
const ROW = 29;
const LEFT = 46;
const RIGHT = 14;
const CHARACTER = 6.2;

const rowTop = (top, rank) => top + rank * ROW;
const last = (values) => Math.max(0, ...values);

function cell(event, y, x, classes, extra = {}) {
  const [left, right] = [x(event.begin), x(event.end)];
  const wide = Math.max(0.8, right - left);
  const words = [event.label, event.mb].find((text) => text && wide > text.length * CHARACTER + 2);
  return svg("g", { class: `pass ${event.kind} ${classes}`, ...extra },
    svg("rect", { class: "body", x: left, y, width: wide, height: LANE }),
    event.chunk ? svg("rect", { class: "chunk", x: left, y: y + LANE - 4, width: wide, height: 2 }) : null,
    words ? label(left + wide / 2, y + LANE - 7, words, { "text-anchor": "middle", class: "inside" }) : null);
}

// Where in a pass the core was elsewhere is not known: it is drawn at the end.
function measuredCell(event, number, y, x) {
  const drawn = cell(event, y, x, "measured", { "data-measured": number, "data-rank": event.rank, "data-cell": event.cell });
  const away = event.cpu === null ? 0 : Math.max(0, event.end - event.begin - event.cpu);
  const wide = x(away) - x(0);
  if (wide >= 1) drawn.querySelector("rect").after(svg("rect", { class: "core", x: x(event.end) - wide, y, width: wide, height: LANE }));
  return drawn;
}

function grid(x, from, bottom, end) {
  const wanted = Math.max(2, Math.floor((x(end) - x(0)) / 80));
  return ticks(end, wanted).flatMap((t) => [
    svg("line", { class: "grid", x1: x(t), x2: x(t), y1: from, y2: bottom }),
    label(x(t), bottom + 14, number(t), { class: "tick", "text-anchor": t === 0 ? "start" : "middle" })]);
}

function rows(top, p, from, to) {
  return Array.from({ length: p }, (_, rank) => [
    label(0, rowTop(top, rank) + LANE - 7, say("rank", { n: rank }), { class: "tick" }),
    svg("rect", { class: "lane", x: from, y: rowTop(top, rank), width: Math.max(0, to - from), height: LANE })]).flat();
}

/** Draw the view into `canvas`; gives the group in which the pass that is looked at is marked. */
function drawLanes(canvas, width, view) {
  const { p, film, passes, measured, ahead } = view;
  const end = Math.max(film.makespan + (ahead ? film.period : 0), last((measured?.events ?? []).map((event) => event.end)));
  const scale = (width - LEFT - RIGHT) / end; // all of it is seen: who wants labels has fewer microbatches
  const x = linear([0, end], [LEFT, LEFT + scale * end]);
  const [top, under] = [22, 22 + p * ROW + 24];
  const bottom = measured ? under + p * ROW : top + p * ROW;
  const marks = svg("g", { class: "marks" });
  const drawn = [
    grid(x, top - 4, bottom, end),
    label(LEFT, top - 8, say("simulated"), { class: "tick caption" }), rows(top, p, LEFT, x(film.makespan)),
    ahead ? passes.map((pass) => cell({ ...pass, begin: pass.begin + film.period,
      end: pass.end + film.period }, rowTop(top, pass.rank), x, "next")) : [],
    passes.map((pass) => cell(pass, rowTop(top, pass.rank), x, "simulated",
      { "data-id": pass.id, "data-rank": pass.rank, "data-cell": pass.cell })),
    measured ? [label(LEFT, under - 8, say("measured", measured), { class: "tick caption" }),
      rows(under, p, LEFT, x(last(measured.events.map((event) => event.end)))),
      measured.events.map((event, i) => measuredCell(event, i, rowTop(under, event.rank), x))] : [],
    label(LEFT + scale * end, bottom + 28, describeAxis(measured), { class: "tick", "text-anchor": "end" }), marks];
  redraw(canvas, LEFT + scale * end + RIGHT, bottom + 34, ...drawn.flat(2));
  return { marks, x, y: (pass) => rowTop(pass.id === undefined ? under : top, pass.rank) };
}

/** Frame the pass, and what it waited for; an arrow from the end of the one to the begin of the other. */
function drawMarks({ marks, x, y }, pass) {
  const frame = (one, name) => svg("rect", { class: `frame ${name}`, "data-cell": one.cell, x: x(one.begin), y: y(one),
    width: x(one.end) - x(one.begin), height: LANE });
  const parts = [];
  if (pass?.need) {
    const [x1, y1, x2, y2] = [x(pass.need.end), y(pass.need) + LANE / 2, x(pass.begin), y(pass) + LANE / 2];
    parts.push(frame(pass.need, "need"), svg("line", { class: "halo", x1, y1, x2, y2 }),
      svg("line", { class: "message", x1, y1, x2, y2 }), svg("circle", { class: "tip", cx: x2, cy: y2, r: 3.5 }));
  }
  if (pass?.before && !pass.blocked) parts.push(frame(pass.before, "before"));
  if (pass) parts.push(frame(pass, "looked"));
  marks.replaceChildren(...parts);
}

/** Frame a measured pass, and the simulated one over it. */
function drawTwins(drawing, event, twin) {
  drawMarks(drawing, event);
  const rect = twin && svg("rect", { class: "frame twin", "data-cell": twin.cell, x: drawing.x(twin.begin), y: drawing.y(twin),
    width: drawing.x(twin.end) - drawing.x(twin.begin), height: LANE });
  if (rect) drawing.marks.append(rect);
}

function kindsIn(view) {
  const kinds = [...new Set([...view.passes, ...(view.measured?.events ?? [])].map((one) => one.kind))];
  const word = (kind) => (kind === "UPDATE" ? say(kind) : say("legend", { letter: kind, words: say(kind) }));
  const entries = ["F", "B", "I", "W", "UPDATE"].filter((kind) => kinds.includes(kind)).map((kind) => [kind, word(kind)]);
  if (view.passes.some((pass) => pass.chunk)) entries.push(["chunk", say("chunk")]);
  if (view.measured) entries.push(["core", say("core")]);
  return [...entries, ["need", say("waited")]];
}

// The pass that an arrow key leads to: the next or the one before of its rank, or what runs then on another rank.
function neighbour(view, pass, key) {
  if (!pass) return view.passes[0];
  const mine = view.passes.filter((one) => one.rank === pass.rank);
  const to = { ArrowLeft: pass.before, ArrowRight: pass.after, Home: mine[0], End: mine.at(-1) };
  if (key in to) return to[key] ?? pass;
  const rank = pass.rank + (key === "ArrowDown" ? 1 : -1);
  const there = view.passes.filter((one) => one.rank === rank);
  const middle = (one) => Math.abs(one.begin + one.end - pass.begin - pass.end);
  return there.reduce((best, one) => (middle(one) < middle(best) ? one : best), there[0]) ?? pass;
}

const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];

export function lanesPanel() {
  const { root, canvas, heading, width } = panel("lanes", "", say("lanesAlt"));
  const box = scrolling(say("lanesBox"), canvas);
  box.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab would take the arrow keys
  const readout = html("p", { class: "bpkit-readout", role: "status" });
  const key = html("div", {}, legend([]));
  root.append(box, readout, key);
  let view = null;
  let drawing = null;
  let looked = null;
  const say1 = (words) => { if (readout.textContent !== words) readout.textContent = words; };
  function look(pass, scroll) {
    looked = pass;
    drawMarks(drawing, pass);
    say1(pass ? describePass(view, pass) : say("hint"));
    if (!pass || !scroll) return;
    const [left, right] = [drawing.x(pass.begin) - LEFT, drawing.x(pass.end) + LEFT];
    if (left < box.scrollLeft) box.scrollLeft = left;
    if (right > box.scrollLeft + box.clientWidth) box.scrollLeft = right - box.clientWidth;
  }
  function lookMeasured(number) {
    const event = view.measured.events[number];
    looked = null;
    const twin = view.passes.find((pass) => pass.rank === event.rank && pass.cell === event.cell);
    drawTwins(drawing, event, twin);
    say1(describeEvent(view, event, twin));
  }
  const under = (event, of) => event.target.closest?.(`[data-${of}]`)?.getAttribute(`data-${of}`);
  for (const type of ["pointerover", "click"]) {
    canvas.addEventListener(type, (event) => {
      const [id, number] = [under(event, "id"), under(event, "measured")];
      if (id != null) look(view.passes[id]);
      if (number != null) lookMeasured(number);
    });
  }
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") look(null);
    if (!KEYS.includes(event.key)) return;
    event.preventDefault();
    look(neighbour(view, looked, event.key), true);
  });
  return { root, draw(next) {
    const same = view?.key === next.key && looked;
    view = next;
    heading.textContent = say("lanesTitle", naming(view));
    drawing = drawLanes(canvas, width(), view);
    key.replaceChildren(legend(kindsIn(view)));
    look(same ? view.passes[looked.id] : null);
  } };
}
