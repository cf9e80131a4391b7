// What the reader works: the worker slider, the choice of a run, the prediction, and the Measure button.
// Each control is built once and only brought up to date, so that it never loses the keyboard's focus.
import { say, sayCount, sayTimes, sayPercent, number } from "./text.js";
import { html } from "./dom.js";
import { describeError } from "./describe.js";

// JupyterLab takes arrow keys and letters for its own commands unless the input itself says no.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };

/** The slider steps through the counts that the data has (of workers, if nothing else is said), not through every integer. */
export function workerSlider(onChoose, name = say("workersLabel"), words = (n) => sayCount("workers", n)) {
  const input = html("input", { type: "range", min: "0", step: "1", ...KEEP_KEYS });
  const output = html("output");
  const stops = html("span", { class: "bpkit-stops", "aria-hidden": "true" });
  const track = html("span", { class: "bpkit-track" }, input, stops);
  const root = html("label", { class: "bpkit-slider" }, html("span", {}, name), track, output);
  let counts = [];
  input.addEventListener("input", () => onChoose(counts[Number(input.value)]));
  return { root, draw(view) {
    counts = view.counts;
    stops.replaceChildren(...counts.map((n) => html("span", {}, number(n))));
    input.max = String(Math.max(0, counts.length - 1));
    input.value = String(counts.indexOf(view.chosen));
    input.disabled = counts.length < 2;
    input.setAttribute("aria-valuetext", words(view.chosen));
    output.textContent = number(view.chosen);
  } };
}

function groupSelect(onChange) {
  const select = html("select", KEEP_KEYS);
  const root = html("label", { class: "bpkit-select" }, html("span", {}, say("measurement")), select);
  select.addEventListener("change", () => onChange(select.selectedIndex));
  return { root, draw(view) {
    root.hidden = view.groups.length < 2;
    if (select.options.length !== view.groups.length) {
      select.replaceChildren(...view.groups.map((group) => html("option", { title: group.title }, group.short)));
    }
    select.selectedIndex = view.groups.indexOf(view.group);
  } };
}

function scalingSwitch(id, onChange) {
  const radio = (mode) => html("input", { type: "radio", name: `bpkit-scaling-${id}`, value: mode, ...KEEP_KEYS });
  const radios = ["strong", "weak"].map(radio);
  const labels = radios.map((one) => html("label", {}, one, say(`${one.value}Hint`)));
  const root = html("fieldset", { class: "bpkit-switch" }, html("legend", {}, say("scaling")), ...labels);
  for (const one of radios) one.addEventListener("change", () => onChange(one.value));
  return { root, draw(view) {
    root.hidden = view.modes.length < 2;
    for (const one of radios) one.checked = one.value === view.mode;
  } };
}

/** Which run is looked at: recorded machine and experiment, strong or weak. */
export function choices(id, onChange) {
  const parts = [groupSelect((choice) => onChange({ choice })), scalingSwitch(id, (scaling) => onChange({ scaling }))];
  const about = html("p", { class: "bpkit-about" });
  const root = html("div", { class: "bpkit-choices" }, about, ...parts.map((part) => part.root));
  return { root, draw(view) {
    for (const part of parts) part.draw(view);
    about.textContent = view.series.length ? aboutRun(view) : say("empty");
  } };
}

function aboutRun(view) {
  const { machine, experiment } = view.series[0].measurement;
  const batch = say(view.mode === "weak" ? "batchWeak" : "batchStrong", { n: number(experiment.batch) });
  const run = say("experiment", { ...experiment, scaling: say(view.mode), batch });
  const { name, cpu } = machine;
  const cores = sayCount("cores", machine.cores);
  const date = (machine.date ?? "").slice(0, 10).replaceAll("-", "\u2011"); // not parted at the end of a line
  // A machine that nobody named is called after its processor already.
  const { noise } = view.series[0].measurement;
  const { steal } = experiment;
  const said = [`${run}.`, `${say(name.includes(cpu) ? "machine" : "machineLong", { name, cpu, cores, date })}.`];
  if (noise) said.push(say("noise", { low: sayTimes(noise.low), high: sayTimes(noise.high) }));
  if (steal != null) said.push(say("steal", { share: sayPercent(steal) }));
  return said.join(" ");
}

function predictionInput(workers, onPredict) {
  const input = html("input", {
    type: "number", min: "0.05", max: String(2 * workers), step: "0.05", inputmode: "decimal", ...KEEP_KEYS });
  input.addEventListener("input", () => {
    const value = Number(input.value);
    const refused = input.value !== "" && !(value > 0);
    input.setAttribute("aria-invalid", String(refused));
    onPredict(workers, input.value === "" || refused ? null : value, refused ? say("predictPositive") : "");
  });
  const times = html("span", { "aria-hidden": "true" }, "×");
  const root = html("label", {}, html("span", {}, sayCount("workers", workers)), input, times);
  return { root, workers, input };
}

function askPanel(onPredict, onShow) {
  const inputs = html("div", { class: "bpkit-inputs" });
  const problem = html("p", { class: "bpkit-problem", role: "alert" });
  const show = html("button", { type: "button", class: "bpkit-main" }, say("show"));
  const skip = html("button", { type: "button" }, say("skip"));
  const buttons = html("p", { class: "bpkit-buttons" }, show, skip);
  const root = html("div", {}, html("p", {}, say("predictHint")), inputs, buttons, problem);
  let fields = [];
  let view = null;
  const complain = (key) => {
    const what = view.series.length ? key : "nothingToShow";
    problem.textContent = what ? say(what) : "";
    return !what;
  };
  show.addEventListener("click", () => {
    const made = view.predictable.some((n) => n in view.prediction);
    if (complain(made ? "" : "predictFirst")) onShow(true);
  });
  skip.addEventListener("click", () => { if (complain("")) onShow(false); });
  return { root, draw(next) {
    view = next;
    if (fields.map((field) => field.workers).join() !== view.predictable.join()) {
      fields = view.predictable.map((n) => predictionInput(n, (workers, value, refused) => {
        problem.textContent = refused;
        onPredict(workers, value);
      }));
      inputs.replaceChildren(...fields.map((field) => field.root));
    }
    for (const { workers, input } of fields) {
      const value = view.prediction[workers];
      // What is being typed ("1.") is left alone; only a drag, or another view, writes into the field.
      const refused = input.getAttribute("aria-invalid") === "true";
      if (!refused && (document.activeElement !== input || Number(input.value) !== value)) input.value = value ?? "";
      if (value !== undefined && !fields.some((one) => one.input.getAttribute("aria-invalid") === "true")) problem.textContent = "";
    }
  } };
}

/** The prediction: asked for first, judged in words after the measurement is shown. */
export function predictionForm({ onPredict, onShow, onAgain }) {
  const ask = askPanel(onPredict, onShow);
  const result = html("p", { class: "bpkit-verdict", tabindex: "-1" });
  const again = html("button", { type: "button", onclick: onAgain }, say("again"));
  const judged = html("div", {}, result, html("p", { class: "bpkit-buttons" }, again));
  const title = html("p", { class: "bpkit-title" });
  const root = html("section", { class: "bpkit-predict", "aria-label": say("predictDone") }, title, ask.root, judged);
  let shown = null;
  return { root, draw(view) {
    ask.draw(view);
    title.textContent = say(view.revealed ? "predictDone" : "predictTitle");
    ask.root.hidden = view.revealed;
    judged.hidden = !view.revealed;
    result.textContent = view.revealed ? describeError(view).join(" ") : "";
    // The button that was pressed has gone: focus follows to the answer, or a keyboard would be lost.
    if (view.revealed && shown === false && root.contains(document.activeElement)) result.focus();
    shown = view.revealed;
  } };
}

const ANSWER_WITHIN_MS = 8000;

/** Measure, progress and Stop. The kernel does the work; this only sends wishes and shows what it says. */
export function measurePanel(model, live) {
  const measure = html("button", { type: "button", class: "bpkit-main" }, say("measure"));
  const stop = html("button", { type: "button" }, say("stop"));
  const bar = html("progress", { max: "1", value: "0", "aria-label": say("progressLabel") });
  const status = html("span", { role: "status" });
  const problem = html("p", { class: "bpkit-problem", role: "alert" });
  const row = html("div", { class: "bpkit-buttons" }, measure, stop, bar, status);
  const root = html("div", { class: "bpkit-measure" }, row, problem);
  let waiting = null;
  measure.addEventListener("click", () => {
    status.textContent = say("phaseStarting");
    model.send({ kind: "measure", scaling: model.get("scaling") });
    clearTimeout(waiting);
    waiting = setTimeout(() => { status.textContent = say("noAnswer"); }, ANSWER_WITHIN_MS);
  });
  stop.addEventListener("click", () => {
    status.textContent = say("phaseStopping");
    model.send({ kind: "stop" });
  });
  const phaseWords = () => {
    const phase = model.get("phase");
    if (phase === "measured" && !model.get("revealed")) return say("phaseMeasuredHidden");
    if (phase === "running") return model.get("status");
    return phase ? say(`phase${phase[0].toUpperCase()}${phase.slice(1)}`) : "";
  };
  return { root, draw() {
    const able = live && model.get("measurable");
    const phase = model.get("phase");
    const running = live && ["starting", "running", "stopping"].includes(phase);
    if (phase) clearTimeout(waiting);
    const focused = [measure, stop].includes(document.activeElement);
    measure.hidden = !able || running;
    measure.textContent = say(model.get("own").length ? "measureAgain" : "measure");
    stop.hidden = bar.hidden = !running;
    // The button that was pressed gives way to the other one, which takes the keyboard's focus.
    if (focused) (running ? stop : measure).focus();
    bar.value = model.get("progress");
    status.textContent = able ? phaseWords() : say(live ? "noNetwork" : "noKernel");
    problem.textContent = model.get("error");
  } };
}
