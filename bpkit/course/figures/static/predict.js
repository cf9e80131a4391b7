// A prediction is asked first, and judged in words after the figure has shown what is so.
import { html } from "./dom.js";

// JupyterLab takes arrow keys and letters for its own commands unless the input itself says no.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };

function predictionField(words, whole, onInput) {
  const step = whole ? { step: "1", inputmode: "numeric" } : { step: "any", inputmode: "decimal" };
  const input = html("input", { type: "number", min: "0", ...step, ...KEEP_KEYS });
  input.addEventListener("input", () => {
    const refused = Number(input.value) < 0;
    input.setAttribute("aria-invalid", String(refused));
    onInput(input.value === "" || refused ? null : Number(input.value), refused);
  });
  const root = html("label", {}, html("span", {}, words), input);
  return { root, draw(value) {
    // What is being typed is left alone; only another choice writes into the field.
    const refused = input.getAttribute("aria-invalid") === "true";
    if (!refused && (document.activeElement !== input || Number(input.value) !== value)) input.value = value ?? "";
  } };
}

/** Numbers to predict: `keys` names the words of each, `say` and `judge` give the figure's own words. */
export function predictionPanel({ keys, whole, say, judge, onGuess, onShow, onSkip, onAgain }) {
  const problem = html("p", { class: "bpkit-problem", role: "alert" });
  const fields = Object.fromEntries(Object.entries(keys).map(([what, key]) =>
    [what, predictionField(say(key), whole, (value, refused) => {
      onGuess(what, value);
      problem.textContent = refused ? say("predictNegative") : "";
    })]));
  const show = html("button", { type: "button", class: "bpkit-main" }, say("show"));
  const skip = html("button", { type: "button", onclick: onSkip }, say("skip"));
  const ask = html("div", {}, html("p", {}, say("predictHint")),
    html("div", { class: "bpkit-inputs" }, ...Object.values(fields).map((field) => field.root)),
    html("p", { class: "bpkit-buttons" }, show, skip), problem);
  const result = html("p", { class: "bpkit-verdict", tabindex: "-1" });
  const again = html("button", { type: "button", onclick: onAgain }, say("again"));
  const judged = html("div", {}, result, html("p", { class: "bpkit-buttons" }, again));
  const title = html("p", { class: "bpkit-title" });
  const root = html("div", { class: "bpkit-predict", role: "group", "aria-label": say("predictDone") }, title, ask, judged);
  let view = null;
  show.addEventListener("click", () => {
    if (Object.keys(view.guess).length) onShow();
    else problem.textContent = say("predictFirst");
  });
  return { root, draw(next) {
    const opened = view && next.open && !view.open && next.key === view.key;
    const focused = root.contains(document.activeElement);
    view = next;
    title.textContent = say(view.open ? "predictDone" : "predictTitle");
    for (const [what, field] of Object.entries(fields)) field.draw(view.guess[what]);
    ask.hidden = view.open;
    judged.hidden = !view.open;
    result.textContent = view.open ? judge(view) : "";
    if (view.open || Object.keys(view.guess).length) problem.textContent = "";
    // The button that was pressed has gone: focus follows to the answer, or a keyboard would be lost.
    if (opened && focused) result.focus();
  } };
}
