// The explorer of one scaling experiment: builds the parts once and draws them whenever the model changes.
import { say } from "./text.js";
import { html, scrolling, write, renderer } from "./dom.js";
import { viewOf } from "./data.js";
import { describe, tableOfRun, tableOfRuns } from "./describe.js";
import { speedupPanel } from "./speedup.js";
import { partsPanel, bytesPanel, throughputPanel, accuracyPanel } from "./bars.js";
import { timelinePanel } from "./timeline.js";
import { workerSlider, choices, predictionForm, measurePanel } from "./controls.js";

// A new object each time: the model compares by reference on a page, by value in Jupyter.
function predict(model, mode, workers, speedup) {
  const all = model.get("prediction");
  const mine = { ...all[mode] };
  if (speedup === null || !(speedup > 0)) delete mine[workers];
  else mine[workers] = speedup;
  write(model, { prediction: { ...all, [mode]: mine } });
}

// Open from the start: who chose one of several runs wants to see the others.
function besideTable() {
  const place = scrolling(say("columnRun"));
  const root = html("div", {}, place);
  return { root, draw(view) {
    const made = tableOfRuns(view);
    place.replaceChildren(...(made ? [made] : []));
    place.hidden = !made;
  } };
}

function textEquivalent() {
  const sentences = html("div", { class: "bpkit-words", role: "status" });
  const tables = scrolling(say("table"));
  const more = html("details", { class: "bpkit-more" }, html("summary", {}, say("table")), tables);
  return { root: html("div", {}, sentences, more), draw(view) {
    const said = describe(view);
    // Written only when it differs, so that a redraw for a new width is not announced again.
    if ([...sentences.children].map((p) => p.textContent).join("\n") !== said.join("\n")) {
      sentences.replaceChildren(...said.map((words) => html("p", {}, words)));
    }
    more.hidden = !view.revealed || !view.series.length;
    tables.replaceChildren(...(more.hidden ? [] : view.series.map((one) => tableOfRun(one, view.chosen))));
  } };
}

// Everything in `answer` stays out of the page until the measurement is shown.
function build(model, live, view) {
  const id = Math.random().toString(36).slice(2, 10);
  const mode = () => view().mode;
  const forget = () => ({ prediction: { ...model.get("prediction"), [mode()]: {} } });
  const speedup = speedupPanel((n, value) => predict(model, mode(), n, value));
  const form = predictionForm({
    onPredict: (n, value) => predict(model, mode(), n, value),
    onShow: (kept) => write(model, { revealed: true, ...(kept ? {} : forget()) }),
    onAgain: () => write(model, { revealed: false, ...forget() }),
  });
  const answer = [partsPanel(), bytesPanel(), throughputPanel(), accuracyPanel(), timelinePanel(id), besideTable()];
  const [parts, bytes, throughput, accuracy, timeline, beside] = answer;
  const always = [choices(id, (changes) => write(model, changes)), workerSlider((workers) => write(model, { workers })),
    speedup, form, textEquivalent(), measurePanel(model, live)];
  const [choice, slider, , , words, measuring] = always;
  const root = html("section", { class: "bpkit-explorer", "aria-label": say("title") },
    html("p", { class: "bpkit-heading" }, say("title")), choice.root, slider.root,
    html("div", { class: "bpkit-pair" }, speedup.root, html("div", { class: "bpkit-side" }, form.root, parts.root)),
    html("div", { class: "bpkit-three" }, bytes.root, throughput.root, accuracy.root),
    timeline.root, beside.root, words.root, measuring.root);
  return { root, draw() {
    const now = view();
    const open = now.revealed && now.series.length > 0;
    root.classList.toggle("revealed", open);
    for (const part of answer) part.root.hidden = !open;
    bytes.root.parentElement.hidden = !open;
    for (const part of always) part.draw(now);
    if (open) for (const part of answer) part.draw(now);
  } };
}

export default { render: renderer((model, live) => build(model, live, () => viewOf(model, live))) };
