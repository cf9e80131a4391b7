// The text equivalent: what the figure shows, in sentences and as a table.
import { say, sayCount, sayTimes, sayPercent, saySeconds, sayBytes, number } from "./text.js";
import { html } from "./dom.js";
import { PARTS } from "./data.js";

const part = (key, seconds, step) => `${saySeconds(seconds, step)} ${say(key)}`;

function accuracySentence(point, experiment) {
  const target = experiment.target_accuracy;
  if (point.time_to_accuracy_s != null) {
    const time = saySeconds(point.time_to_accuracy_s);
    if (!target) return say("sayTime", { time });
    const steps = sayCount("steps", point.steps_to_accuracy ?? 0);
    return say("sayReached", { target: sayPercent(target), time, steps });
  }
  return target ? say("sayNotReached", { target: sayPercent(target) }) : say("sayNotMeasured");
}

function bytesSentence(point) {
  if (point.bytes_sent != null) return say("sayBytes", { bytes: sayBytes(point.bytes_sent) });
  return say("sayNotCounted", { algorithm: point.algorithm ?? "", payload: sayBytes(point.payload_bytes ?? 0) });
}

/** What one run shows for `workers`, in words. */
export function describePoint(one, workers) {
  const point = one.at(workers);
  const count = sayCount("workers", workers);
  if (!point) return say("noPoint", { name: one.name, workers: count });
  const step = point.step_s.median;
  const parts = PARTS.filter((name) => point.parts[name] > 0).map((name) => part(name, point.parts[name], step));
  const accuracy = accuracySentence(point, one.measurement.experiment);
  const sentence = say("say", {
    workers: count, name: one.name, speedup: sayTimes(point.speedup), ideal: sayTimes(workers),
    efficiency: sayPercent(point.efficiency), step: saySeconds(step), parts: parts.join(", "),
  });
  return sentence
    + (point.simulated ? say("saySimulated") : "")
    + (point.hidden_communication > 0 ? say("sayHidden", { hidden: saySeconds(point.hidden_communication, step) }) : "")
    + bytesSentence(point)
    + say("sayThroughput", { throughput: number(Math.round(point.throughput)), accuracy });
}

function describeHidden(view) {
  const set = view.predictable.filter((n) => n in view.prediction);
  const list = set.map((n) => `${sayCount("workers", n)} ${sayTimes(view.prediction[n])}`).join(", ");
  return say("hiddenState") + (set.length ? say("hiddenPrediction", { list }) : say("hiddenNone"));
}

/** The whole state in words: it stands under the figure and is announced when it changes. */
export function describe(view) {
  if (!view.series.length) return [say("empty")];
  return view.revealed ? view.barred.map((one) => describePoint(one, view.chosen)) : [describeHidden(view)];
}

function verdict(predicted, measured) {
  const off = predicted - measured;
  const values = { difference: sayTimes(Math.abs(off)), percent: sayPercent(Math.abs(off) / measured) };
  return Math.abs(off) < 0.005 ? say("exact") : say(off > 0 ? "tooHigh" : "tooLow", values);
}

/** How far off the prediction was, against the reader's own run where there is one. */
export function describeError(view) {
  const set = view.predictable.filter((n) => n in view.prediction && view.judge?.at(n));
  if (!set.length) return [say("predictedNothing")];
  const off = set.map((n) => Math.abs(view.prediction[n] / view.judge.at(n).speedup - 1));
  const sentences = set.map((n) => {
    const [predicted, measured] = [view.prediction[n], view.judge.at(n).speedup];
    return say("predictedOne", { workers: sayCount("workers", n), predicted: sayTimes(predicted),
      measured: sayTimes(measured), verdict: verdict(predicted, measured) });
  });
  const percent = sayPercent(off.reduce((a, b) => a + b) / off.length);
  const mean = set.length > 1 ? [say("predictedMean", { percent })] : [];
  return [...sentences, ...mean, say("comparedWith", { name: view.judge.name })];
}

const QUANTITIES = [
  ["rowSpeedup", (p) => sayTimes(p.speedup)],
  ["rowEfficiency", (p) => sayPercent(p.efficiency)],
  ["rowStep", (p) => saySeconds(p.step_s.median)],
  ["rowSpread", (p) => (p.step_s.q1 == null ? "" : `${saySeconds(p.step_s.q1)} – ${saySeconds(p.step_s.q3)}`)],
  ...PARTS.map((name) => [name, (p) => saySeconds(p.parts[name] ?? 0, p.step_s.median)]),
  ["rowHidden", (p) => saySeconds(p.hidden_communication ?? 0, p.step_s.median)],
  ["rowBytes", (p) => (p.bytes_sent != null ? sayBytes(p.bytes_sent)
    : say("notCounted", { bytes: sayBytes(p.payload_bytes ?? 0) }))],
  ["rowThroughput", (p) => number(Math.round(p.throughput))],
  ["rowAccuracy", (p) => (p.time_to_accuracy_s == null ? "–" : saySeconds(p.time_to_accuracy_s))],
];

/** All recorded runs side by side: a row a run, at the chosen worker count; none where there is only one. */
export function tableOfRuns(view) {
  const rows = view.beside.map((one) => [one.name, one.at(view.chosen)]).filter(([, point]) => point);
  if (rows.length < 2) return null;
  const keys = [["rowStep", (p) => saySeconds(p.step_s.median)], ["rowSpeedup", (p) => sayTimes(p.speedup)],
    ...PARTS.map((name) => [name, (p) => sayPercent((p.parts[name] ?? 0) / p.step_s.median)]),
    ["rowBytes", (p) => (p.bytes_sent != null ? sayBytes(p.bytes_sent) : "–")],
    ["columnPayload", (p) => sayBytes(p.payload_bytes ?? 0)],
    ["columnMemory", (p) => (p.memory_bytes != null ? sayBytes(p.memory_bytes) : "–")]];
  const head = ["columnRun", ...keys.map(([key]) => key)].map((key) => html("th", { scope: "col" }, say(key)));
  const body = rows.map(([name, point]) => html("tr", {}, html("th", { scope: "row" }, name),
    ...keys.map(([, read]) => html("td", {}, read(point)))));
  return html("table", { class: "bpkit-beside" }, html("caption", {}, say("besideTitle", { workers: sayCount("workers", view.chosen) })),
    html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...body));
}

/** One table a run: a row a quantity, a column a worker count, the chosen one marked. */
export function tableOfRun(one, chosen) {
  const mark = (point) => (point.workers === chosen ? { class: "chosen" } : {});
  const columns = one.points.map((p) => html("th", { scope: "col", ...mark(p) }, sayCount("workers", p.workers)));
  const head = html("tr", {}, html("td"), ...columns);
  const rows = QUANTITIES.map(([key, read]) => html("tr", {}, html("th", { scope: "row" }, say(key)),
    ...one.points.map((p) => html("td", mark(p), read(p)))));
  return html("table", {}, html("caption", {}, one.name), html("thead", {}, head), html("tbody", {}, ...rows));
}
