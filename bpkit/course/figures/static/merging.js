// The explorer of the ways to merge: choose one, predict, and go through its steps. Each step is read from its plan.
import { html, scrolling, write, renderer } from "./dom.js";
import { sayCount } from "./text.js";
import { workerSlider } from "./controls.js";
import { say, sayPart, sayHolding, sayWhen, sayExactly, describe, describeError } from "./merging_words.js";
import { predictionPanel } from "./predict.js";
import { stripsPanel } from "./merging_strips.js";

// JupyterLab takes arrow keys and letters for its own commands unless the input itself says no.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };
const MILLISECONDS_A_STEP = 1500;

// What the kernel packed as text: a message is [source, to, low, high, bytes, adds], a frame a list of parts a rank.
const movesOf = (film, step) => film.steps[step].split("|").map((message) => message.split(" ").map(Number));
const frameOf = (film, step) => film.frames[step].split("|").map((rank) => rank.split(" "));

function sentUpTo(film, step) {
  const sent = Array(film.workers).fill(0);
  for (let at = 0; at < step; at += 1) for (const [source, , , , bytes] of movesOf(film, at)) sent[source] += bytes;
  return sent;
}

/** Everything that is drawn, read from the model at one moment. */
function viewOf(model) {
  const films = model.get("films");
  const names = [...new Set(films.map((film) => film.name))];
  const name = model.get("algorithm");
  const counts = films.filter((film) => film.name === name).map((film) => film.workers);
  const wanted = model.get("workers");
  const chosen = counts.reduce((best, n) => (Math.abs(n - wanted) < Math.abs(best - wanted) ? n : best));
  const film = films.find((one) => one.name === name && one.workers === chosen);
  const key = `${name}/${chosen}`;
  const open = model.get("skipped") || model.get("shown").includes(key);
  const last = film.steps.length;
  const step = open ? Math.min(model.get("step"), last) : 0;
  return { names, name, counts, chosen, film, key, open, last, step, size: model.get("size_bytes"),
    frame: frameOf(film, step), moves: step ? movesOf(film, step - 1) : [],
    sent: sentUpTo(film, step), total: sentUpTo(film, last)[0], guess: model.get("prediction")[key] ?? {} };
}

function choicePanel(onChange) {
  const select = html("select", KEEP_KEYS);
  const pick = html("label", { class: "bpkit-select" }, html("span", {}, say("algorithm")), select);
  const slider = workerSlider((workers) => onChange({ workers }));
  const about = html("p", { class: "bpkit-about" });
  const root = html("div", { class: "bpkit-choices" }, pick, slider.root, about);
  let names = [];
  select.addEventListener("change", () => onChange({ algorithm: names[select.selectedIndex] }));
  return { root, draw(view) {
    if (names.join() !== view.names.join()) {
      names = view.names;
      select.replaceChildren(...names.map((name) => html("option", {}, say(name))));
    }
    select.selectedIndex = names.indexOf(view.name);
    slider.draw(view);
    const text = say(`about${view.name[0].toUpperCase()}${view.name.slice(1)}`, { last: view.chosen / 2 - 1 });
    about.textContent = `${text} ${say("setting", { workers: sayCount("workers", view.chosen), size: sayExactly(view.size) })}`;
  } };
}

/** Back, forward, play and a slider over the steps. The buttons stay where the focus is, also at the ends. */
function stepPanel(onStep) {
  let view = null;
  let timer = null;
  const go = (step) => onStep(Math.max(0, Math.min(view.last, step)));
  const pause = () => { clearInterval(timer); timer = null; };
  const press = (key, act) => html("button", { type: "button", onclick: act }, say(key));
  const stopAndGo = (step) => { pause(); go(step()); };
  const reset = press("reset", () => stopAndGo(() => 0));
  const back = press("back", () => stopAndGo(() => view.step - 1));
  const forward = press("forward", () => stopAndGo(() => view.step + 1));
  const play = press("play", () => {
    if (timer) { pause(); paint(); return; }
    timer = setInterval(() => go(view.step + 1), MILLISECONDS_A_STEP);
    go(view.step === view.last ? 0 : view.step + 1);
  });
  const input = html("input", { type: "range", min: "0", step: "1", ...KEEP_KEYS });
  input.addEventListener("input", () => stopAndGo(() => Number(input.value)));
  const output = html("output");
  const root = html("div", { class: "bpkit-buttons bpkit-stepper", role: "group", "aria-label": say("stepping") },
    reset, back, play, forward, html("label", {}, html("span", {}, say("stepping")), input, output));
  function paint() {
    if (!view.open || view.step === view.last) pause();
    root.hidden = !view.open;
    input.max = String(view.last);
    input.value = String(view.step);
    input.setAttribute("aria-valuetext", sayWhen(view));
    output.textContent = `${view.step} / ${view.last}`;
    play.textContent = say(timer ? "pause" : "play");
    for (const [button, end] of [[reset, 0], [back, 0], [forward, view.last]]) {
      button.setAttribute("aria-disabled", String(view.step === end));
    }
  }
  return { root, close: pause, draw(next) { view = next; paint(); } };
}

function tableOf(view) {
  const { parts } = view.film;
  const column = (words) => html("th", { scope: "col" }, words);
  const heads = view.frame[0].map((_, part) => column(sayPart(part, part + 1, parts)));
  const rows = view.frame.map((row, rank) => html("tr", {}, html("th", { scope: "row" }, say("rank", { n: rank })),
    ...row.map((members) => html("td", {}, sayHolding(members))), html("td", {}, sayExactly(view.sent[rank]))));
  return html("table", {}, html("caption", {}, say("tableCaption", { when: sayWhen(view) })),
    html("thead", {}, html("tr", {}, column(say("columnRank")), ...heads, column(say("columnSent")))),
    html("tbody", {}, ...rows));
}

function wordsPanel() {
  const sentences = html("div", { class: "bpkit-words", role: "status" });
  const table = scrolling(say("table"));
  const more = html("details", { class: "bpkit-more" }, html("summary", {}, say("table")), table);
  return { root: html("div", {}, sentences, more), draw(view) {
    const said = describe(view);
    // Written only when it differs, so that a redraw for a new width is not announced again.
    if ([...sentences.children].map((p) => p.textContent).join("\n") !== said.join("\n")) {
      sentences.replaceChildren(...said.map((words) => html("p", {}, words)));
    }
    table.replaceChildren(tableOf(view));
  } };
}

function build(model) {
  const view = () => viewOf(model);
  const guess = (what, value) => {
    const { key, guess: { [what]: _, ...others } } = view();
    const mine = value === null || !(value >= 0) ? others : { ...others, [what]: value };
    write(model, { prediction: { ...model.get("prediction"), [key]: mine } });
  };
  const without = ({ [view().key]: _, ...others }) => others;
  const prediction = predictionPanel({
    keys: { steps: "predictSteps", bytes: "predictBytes" }, whole: true, say, judge: describeError,
    onGuess: guess,
    onShow: () => write(model, { shown: [...model.get("shown"), view().key], step: 0 }),
    onSkip: () => write(model, { shown: [...model.get("shown"), view().key], step: 0 }),
    onAgain: () => write(model, { skipped: false, step: 0, prediction: without(model.get("prediction")),
      shown: model.get("shown").filter((key) => key !== view().key) }),
  });
  const stepper = stepPanel((step) => write(model, { step }));
  const choice = choicePanel((changes) => {
    stepper.close();
    write(model, { ...changes, step: 0 });
  });
  const panels = [choice, prediction, stepper, stripsPanel(), wordsPanel()];
  const root = html("section", { class: "bpkit-explorer bpkit-merging", "aria-label": say("title") },
    html("p", { class: "bpkit-heading" }, say("title")), ...panels.map((panel) => panel.root));
  return { root, close: stepper.close, draw() { const now = view(); for (const panel of panels) panel.draw(now); } };
}

export default { render: renderer(build) };
