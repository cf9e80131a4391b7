// Rows of bars, one row a worker count: stacked for the parts of a step, plain for bytes and throughput.
import { say, number, saySeconds, sayBytes, sayPercent } from "./text.js";
import { svg, label, linear, redraw, panel, legend } from "./dom.js";
import { PARTS } from "./data.js";

const BAR = 15;
const GAP = 3;
const ROW_GAP = 11;
const LEFT = 26;

// A row's note stands inside the bar's own line, to the right of it, and never outside the drawing.
function drawBar({ segments, note, under, kind }, y, scale, limit) {
  let at = LEFT;
  const rects = segments.map(({ value, name }) => {
    const wide = Math.max(0, scale(value) - LEFT);
    const rect = svg("rect", { class: `part ${name}`, x: at, y, width: wide, height: BAR, "data-value": value });
    at += wide;
    return rect;
  });
  const stripe = under > 0 ? svg("rect", {
    class: "part hidden_communication", x: LEFT, y: y + BAR - 4, width: scale(under) - LEFT, height: 4 }) : null;
  const words = label(Math.min(at + 6, limit), y + BAR - 3.5, note, { class: `value ${kind}` });
  return svg("g", { class: `bar ${kind}` }, ...rects, stripe, words);
}

/** Draw `rows` = [{workers, bars: [{kind, segments: [{name, value}], note, under}]}] into `canvas`. */
function drawRows(canvas, width, rows, chosen, noteWidth) {
  const totals = rows.flatMap((row) => row.bars.map((bar) => bar.segments.reduce((sum, s) => sum + s.value, 0)));
  const scale = linear([0, Math.max(...totals, 0) || 1], [LEFT, Math.max(LEFT + 40, width - noteWidth)]);
  let y = 4;
  const drawn = rows.map(({ workers, bars }) => {
    const tall = Math.max(1, bars.length) * (BAR + GAP) - GAP;
    const group = svg("g", { class: workers === chosen ? "row chosen" : "row", "data-workers": workers },
      label(LEFT - 9, y + tall / 2 + 4.5, number(workers), { "text-anchor": "end", class: "tick" }),
      ...bars.map((bar, i) => drawBar(bar, y + i * (BAR + GAP), scale, width - noteWidth + 6)));
    y += tall + ROW_GAP;
    return group;
  });
  const caption = label(0, y + 5, say("axisWorkers"), { class: "tick" });
  const axis = svg("line", { class: "axis", x1: LEFT, x2: LEFT, y1: 0, y2: y - ROW_GAP + 4 });
  redraw(canvas, width, y + 10, ...drawn, axis, caption);
}

function rowsOf(view, barOf) {
  return view.counts.map((workers) => ({
    workers,
    bars: view.barred.filter((one) => one.at(workers))
      .map((one) => ({ kind: one.kind, ...barOf(one.at(workers), one) })),
  }));
}

const partsBar = (point) => ({
  segments: PARTS.map((name) => ({ name, value: point.parts[name] ?? 0 })),
  under: Math.min(point.hidden_communication ?? 0, point.parts.compute ?? 0),
  note: saySeconds(point.step_s.median),
});

/** Compute, waiting for a core, exposed communication and idle, stacked to the time of a step. */
export function partsPanel() {
  const { root, canvas, width } = panel("parts", say("partsTitle"), say("partsAlt"));
  root.append(legend([]));
  return { root, draw(view) {
    drawRows(canvas, width(), rowsOf(view, partsBar), view.chosen, 66);
    const hidden = view.barred.some((one) => one.points.some((point) => point.hidden_communication > 0));
    root.lastChild.replaceWith(legend([...PARTS.map((name) => [name, say(name)]),
      ...(hidden ? [["hidden_communication", say("hidden_communication")]] : [])]));
  } };
}

const counted = (point) => point.bytes_sent !== null && point.bytes_sent !== undefined;

function bytesBar(point) {
  const value = (counted(point) ? point.bytes_sent : point.payload_bytes) ?? 0;
  return { segments: [{ name: counted(point) ? "bytes" : "payload", value }], note: sayBytes(value) };
}

const throughputBar = ({ throughput }) => ({
  segments: [{ name: "plain", value: throughput }], note: number(Math.round(throughput)) });

function accuracyBar(point, one) {
  const value = point.time_to_accuracy_s;
  const missing = one.measurement.experiment.target_accuracy ? "notReached" : "notMeasured";
  return { segments: [{ name: "plain", value: value ?? 0 }], note: value == null ? say(missing) : saySeconds(value) };
}

function plainPanel(name, barOf, noteWidth, extra = () => {}) {
  const { root, canvas, heading, width } = panel(name, say(`${name}Title`, { accuracy: "" }), say(`${name}Alt`));
  return { root, draw(view) {
    drawRows(canvas, width(), rowsOf(view, barOf), view.chosen, noteWidth);
    extra(view, root, heading);
  } };
}

export function bytesPanel() {
  return plainPanel("bytes", bytesBar, 66, (view, root) => {
    root.querySelector("ul")?.remove();
    if (!view.barred.every((one) => one.points.every(counted))) root.append(legend([["payload", say("payload")]]));
  });
}

export const throughputPanel = () => plainPanel("throughput", throughputBar, 62);

export function accuracyPanel() {
  return plainPanel("accuracy", accuracyBar, 84, (view, root, heading) => {
    const target = view.judge?.measurement.experiment.target_accuracy;
    heading.textContent = target ? say("accuracyTitle", { accuracy: sayPercent(target) }) : say("accuracyTitlePlain");
  });
}
