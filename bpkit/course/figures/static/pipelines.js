// The pipeline explorer: choose a schedule, predict, and look at its timeline, simulated and measured.
import { html, write, renderer } from "./dom.js";
import { measurePanel } from "./controls.js";
import { say, describeError } from "./pipelines_words.js";
import { predictionPanel } from "./predict.js";
import { viewOf } from "./pipelines_view.js";
import { lanesPanel } from "./pipelines_lanes.js";
import { choicePanel, aheadSwitch, factsPanel, comparePanel, wordsPanel } from "./pipelines_panels.js";

function askFor(model) {
  const view = () => viewOf(model);
  const without = ({ [view().key]: _, ...others }) => others;
  return predictionPanel({
    keys: { period: "predictPeriod", bubble: "predictBubble" }, say, judge: describeError,
    onGuess(what, value) {
      const { key, guess: { [what]: _, ...others } } = view();
      const mine = value === null || !(value >= 0) ? others : { ...others, [what]: value };
      write(model, { prediction: { ...model.get("prediction"), [key]: mine } });
    },
    onShow: () => write(model, { shown: [...model.get("shown"), view().key], revealed: true }),
    onSkip: () => write(model, { skipped: true, revealed: true }),
    onAgain: () => write(model, { skipped: false, revealed: false, prediction: without(model.get("prediction")),
      shown: model.get("shown").filter((key) => key !== view().key) }),
  });
}

// Everything in `answer` stays out of the page until it is asked for.
function build(model, live) {
  const choice = choicePanel((changes) => write(model, changes));
  const [prediction, words, measuring] = [askFor(model), wordsPanel(), measurePanel(model, live)];
  const answer = [aheadSwitch((ahead) => write(model, { ahead })), lanesPanel(), factsPanel(), comparePanel()];
  const [ahead, lanes, facts, compare] = answer;
  const pair = html("div", { class: "bpkit-pair" }, facts.root, compare.root);
  const root = html("section", { class: "bpkit-explorer bpkit-pipelines", "aria-label": say("title") },
    html("p", { class: "bpkit-heading" }, say("title")), choice.root, prediction.root, ahead.root, lanes.root, pair,
    words.root, measuring.root, live ? html("p", { class: "bpkit-about" }, say("measureNote")) : null);
  return { root, draw() {
    const now = viewOf(model);
    for (const part of [...answer, { root: pair }]) part.root.hidden = !now.open;
    for (const part of [choice, prediction, words, measuring]) part.draw(now);
    if (now.open) for (const part of answer) part.draw(now);
  } };
}

export default { render: renderer(build) };
