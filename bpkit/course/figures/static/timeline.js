// One training step, a row for each rank: what ran when, and what it waited for.
import { say, sayCount, saySeconds, number } from "./text.js";
import { LOOKS } from "./kinds.js";
import { html, svg, label, linear, ticks, redraw, panel, legend, scrolling } from "./dom.js";

const LANE = 18;
const THIN = 7;
const LEFT = 52;
const CHARACTER = 6.6;
const KINDS = ["forward", "backward", "input_half", "weight_half", "communication", "update", "other"];

/** The look of an action, from its text: "0F0" is a forward, "1SEND_B3" is communication. */
const kindOf = (cell) => LOOKS[/[A-Z]+(_[A-Z]+)*/.exec(cell)?.[0]] ?? "other";

// Where in an action the core was elsewhere is not known: it is drawn at the end. Older records do not have it.
function coreOf(kind, length, wait, cpu) {
  const away = kind === "communication" || !(cpu >= 0) ? 0 : length - wait - cpu;
  return away > 0.5 ? away : 0; // half a microsecond is rounding
}

const events = (timeline) => timeline.map(([rank, cell, start, end, wait = 0, cpu = -1]) => {
  const kind = kindOf(cell);
  return { rank, cell, start, end, wait, kind, core: coreOf(kind, end - start, wait, cpu) };
});

// Communication runs beside compute and beside other communication: what overlaps gets a lane of its own.
function assignLanes(all) {
  const ends = new Map();
  for (const event of [...all].sort((a, b) => a.start - b.start)) {
    if (event.kind !== "communication") continue;
    const busy = ends.get(event.rank) ?? [];
    const free = busy.findIndex((end) => end <= event.start);
    event.lane = free < 0 ? busy.length : free;
    busy[event.lane] = event.end;
    ends.set(event.rank, busy);
  }
  return Math.max(0, ...[...ends.values()].map((busy) => busy.length));
}

function tooltip(event) {
  const us = (time) => saySeconds(time / 1e6);
  const { rank, cell, start, end, wait } = event;
  const words = [say("event", { rank, cell, length: us(end - start), start: us(start) })];
  if (wait > 0) words.push(say("eventWait", { wait: us(wait) }));
  if (event.core > 0) words.push(say("eventCore", { core: us(event.core) }));
  return svg("title", {}, words.join(""));
}

// The wait is the first part of the action that waited: it is hatched, so that it reads without colour.
function drawEvent(event, y, x, hatch) {
  const tall = event.kind === "communication" ? THIN : LANE;
  const left = x(event.start);
  const wide = Math.max(0.8, x(event.end) - left);
  const waited = Math.min(wide, x(event.start + event.wait) - left);
  const core = Math.min(wide - waited, x(event.start + event.core) - left);
  const named = tall === LANE && wide - waited - core > event.cell.length * CHARACTER + 6;
  const middle = left + (wide + waited - core) / 2;
  return svg("g", { class: `event ${event.kind}`, "data-cell": event.cell, "data-rank": event.rank },
    svg("rect", { class: `part ${event.kind}`, x: left, y, width: wide, height: tall }),
    waited > 0.5
      ? svg("rect", { class: "waited", x: left, y, width: waited, height: tall, fill: `url(#${hatch})` }) : null,
    core > 0.5
      ? svg("rect", { class: "part waiting_for_core", x: left + wide - core, y, width: core, height: tall }) : null,
    named ? label(middle, y + LANE - 5, event.cell, { "text-anchor": "middle", class: "inside" }) : null,
    tooltip(event));
}

function hatchPattern(id) {
  return svg("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { width: 5, height: 5, class: "hatch-ground" }),
    svg("line", { x1: 0, x2: 0, y1: 0, y2: 5, class: "hatch-line" }));
}

/** Draw a timeline into `canvas`; `hatch` is an id that is free on the page. */
export function drawTimeline(canvas, width, timeline, hatch) {
  const all = events(timeline);
  const ranks = [...new Set(all.map((event) => event.rank))].sort((a, b) => a - b);
  const origin = Math.min(...all.map((event) => event.start));
  const last = Math.max(...all.map((event) => event.end)) - origin;
  const x = linear([origin, origin + last], [LEFT, width - 12]);
  const tall = LANE + assignLanes(all) * (THIN + 1) + 12;
  const rowTop = (rank) => 4 + ranks.indexOf(rank) * tall;
  const laneTop = (event) => (event.kind === "communication" ? LANE + 1 + event.lane * (THIN + 1) : 0);
  const bottom = 4 + ranks.length * tall;
  const marks = ticks(last, width < 500 ? 3 : 6).map((t) => [
    svg("line", { class: "grid", x1: x(origin + t), x2: x(origin + t), y1: 0, y2: bottom }),
    label(x(origin + t), bottom + 14, saySeconds(t / 1e6, last / 1e6),
      { class: "tick", "text-anchor": t === 0 ? "start" : "middle" }),
  ]);
  const rows = ranks.map((rank) =>
    label(0, rowTop(rank) + LANE - 4, say("rank", { n: number(rank) }), { class: "tick" }));
  const drawn = all.map((event) => drawEvent(event, rowTop(event.rank) + laneTop(event), x, hatch));
  redraw(canvas, width, bottom + 20, svg("defs", {}, hatchPattern(hatch)), ...marks.flat(), ...rows, ...drawn);
  return all;
}

function tableOf(all) {
  const keys = ["columnRank", "columnAction", "columnStart", "columnEnd", "columnWait", "waiting_for_core"];
  const head = keys.map((key) => html("th", { scope: "col" }, say(key)));
  const most = Math.max(...all.map((e) => e.end)) / 1e6;
  const ms = (us) => saySeconds(us / 1e6, most);
  const cells = (e) => [number(e.rank), e.cell, ms(e.start), ms(e.end), ms(e.wait), ms(e.core)];
  const rows = all.map((e) => html("tr", {}, ...cells(e).map((cell) => html("td", {}, cell))));
  return html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...rows));
}

function kindsIn(all) {
  const kinds = KINDS.filter((kind) => all.some((event) => event.kind === kind)).map((kind) => [kind, say(kind)]);
  if (all.some((event) => event.core > 0)) kinds.push(["waiting_for_core", say("waiting_for_core")]);
  return all.some((event) => event.wait > 0) ? [...kinds, ["waited", say("wait")]] : kinds;
}

/** The timeline of the chosen worker count: the reader's latest run, or else the recorded one. */
export function timelinePanel(id) {
  const { root, canvas, heading, width } = panel("timeline", "", say("timelineAlt"));
  const table = html("details", { class: "bpkit-more" }, html("summary", {}, say("tableTimeline")));
  root.append(legend([]), table);
  return { root, draw(view) {
    const source = [...view.barred].reverse().find((one) => one.at(view.chosen)?.timeline?.length);
    const workers = sayCount("workers", view.chosen);
    const key = source ? "timelineTitle" : "timelineNone";
    heading.textContent = say(key, { workers, name: source?.name });
    for (const part of [canvas, table]) part.style.display = source ? "" : "none";
    table.querySelector(".bpkit-scroll")?.remove();
    const all = source ? drawTimeline(canvas, width(), source.at(view.chosen).timeline, `bpkit-hatch-${id}`) : [];
    root.querySelector("ul").replaceWith(legend(kindsIn(all)));
    if (source) table.append(scrolling(say("tableTimeline"), tableOf(all)));
  } };
}
