// One training step, a row for each rank: what ran when, and what it waited for.
import { say, sayCount, saySeconds, number } from "./text.js";
import { html, svg, label, linear, ticks, redraw, panel, legend } from "./dom.js";

const LANE = 18;
const THIN = 9;
const LEFT = 52;
const CHARACTER = 6.6;

/** The class of an action, from its text: "0F0" is a forward, "1SEND_B3" is communication. */
export function kindOf(cell) {
  const kinds = [[/^\d*(F|RECOMPUTE)\d*$/, "forward"], [/^\d*[BIW]\d*$/, "backward"], [/UPDATE/, "update"],
    [/SEND|RECV|REDUCE|SHARD|SCATTER|SUM|AVERAGE|NORM|ADD/, "communication"]];
  return kinds.find(([pattern]) => pattern.test(cell))?.[1] ?? "other";
}

const events = (timeline) => timeline.map(([rank, cell, start, end, wait]) => ({ rank, cell, start, end, wait: wait ?? 0, kind: kindOf(cell) }));

function tooltip(event) {
  const words = say("event", { rank: event.rank, cell: event.cell, length: saySeconds((event.end - event.start) / 1e6), start: saySeconds(event.start / 1e6) });
  return svg("title", {}, event.wait > 0 ? words + say("eventWait", { wait: saySeconds(event.wait / 1e6) }) : words);
}

// The wait is the first part of the action that waited: it is hatched, so that it reads without colour.
function drawEvent(event, y, x, hatch) {
  const tall = event.kind === "communication" ? THIN : LANE;
  const left = x(event.start);
  const wide = Math.max(0.8, x(event.end) - left);
  const waited = Math.min(wide, x(event.start + event.wait) - left);
  const room = wide - waited > event.cell.length * CHARACTER + 6;
  return svg("g", { class: `event ${event.kind}`, "data-cell": event.cell, "data-rank": event.rank },
    svg("rect", { class: `part ${event.kind}`, x: left, y, width: wide, height: tall }),
    waited > 0.5 ? svg("rect", { x: left, y, width: waited, height: tall, class: "waited", fill: `url(#${hatch})` }) : null,
    room && tall === LANE ? label(left + waited + (wide - waited) / 2, y + LANE - 5, event.cell, { "text-anchor": "middle", class: "inside" }) : null,
    tooltip(event));
}

function hatchPattern(id) {
  return svg("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { width: 5, height: 5, class: "hatch-ground" }), svg("line", { x1: 0, x2: 0, y1: 0, y2: 5, class: "hatch-line" }));
}

/** Draw a timeline into `canvas`; `hatch` is an id that is free on the page. */
export function drawTimeline(canvas, width, timeline, hatch) {
  const all = events(timeline);
  const ranks = [...new Set(all.map((event) => event.rank))].sort((a, b) => a - b);
  const origin = Math.min(...all.map((event) => event.start));
  const last = Math.max(...all.map((event) => event.end)) - origin;
  const x = linear([origin, origin + last], [LEFT, width - 12]);
  const lanes = all.some((event) => event.kind === "communication") ? LANE + 2 + THIN : LANE;
  const rowTop = (rank) => 4 + ranks.indexOf(rank) * (lanes + 12);
  const bottom = 4 + ranks.length * (lanes + 12);
  const marks = ticks(last, width < 500 ? 3 : 6).map((t) => [
    svg("line", { class: "grid", x1: x(origin + t), x2: x(origin + t), y1: 0, y2: bottom }),
    label(x(origin + t), bottom + 14, saySeconds(t / 1e6, last / 1e6), { class: "tick", "text-anchor": t === 0 ? "start" : "middle" }),
  ]);
  const rows = ranks.map((rank) => label(0, rowTop(rank) + LANE - 4, say("rank", { n: number(rank) }), { class: "tick" }));
  const drawn = all.map((event) => drawEvent(event, rowTop(event.rank) + (event.kind === "communication" ? LANE + 2 : 0), x, hatch));
  redraw(canvas, width, bottom + 20, svg("defs", {}, hatchPattern(hatch)), ...marks.flat(), ...rows, ...drawn);
  return all;
}

function tableOf(all) {
  const head = ["rank", "columnAction", "columnStart", "columnEnd", "columnWait"].map((key) => html("th", { scope: "col" }, say(key, { n: "" })));
  const most = Math.max(...all.map((e) => e.end)) / 1e6;
  const ms = (us) => saySeconds(us / 1e6, most);
  const rows = all.map((e) => html("tr", {}, ...[number(e.rank), e.cell, ms(e.start), ms(e.end), ms(e.wait)].map((cell) => html("td", {}, cell))));
  return html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...rows));
}

/** The timeline of the chosen worker count: the reader's latest run, or else the recorded one. */
export function timelinePanel(id) {
  const { root, canvas, heading, width } = panel("timeline", "", say("timelineAlt"));
  const table = html("details", { class: "bpkit-more" }, html("summary", {}, say("tableTimeline")));
  root.append(legend([]), table);
  return { root, draw(view) {
    const source = [...view.barred].reverse().find((one) => one.at(view.chosen)?.timeline?.length);
    const workers = sayCount("workers", view.chosen);
    heading.textContent = source ? say("timelineTitle", { workers, name: source.name }) : say("timelineNone", { workers });
    for (const part of [canvas, table]) part.style.display = source ? "" : "none";
    const all = source ? drawTimeline(canvas, width(), source.at(view.chosen).timeline, `bpkit-hatch-${id}`) : [];
    const kinds = ["forward", "backward", "communication", "update", "other"].filter((kind) => all.some((event) => event.kind === kind));
    const words = [...kinds.map((kind) => [kind, say(kind)]), ...(all.some((event) => event.wait > 0) ? [["waited", say("wait")]] : [])];
    root.querySelector("ul").replaceWith(legend(words));
    table.querySelector(".bpkit-scroll")?.remove();
    if (source) table.append(html("div", { class: "bpkit-scroll", tabindex: "0", role: "region", "aria-label": say("tableTimeline") }, tableOf(all)));
  } };
}
