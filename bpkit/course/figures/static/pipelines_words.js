// The words of the pipeline explorer alone; those that all figures share stand in text.js.
import { language, fillIn, sayPercent, saySeconds, number } from "./text.js";

const WORDS = {
  en: {
    title: "Pipelines, from the naive split to zero bubble",
    schedule: "Schedule",
    naive: "naive split",
    gpipe: "GPipe",
    one_f_one_b: "1F1B",
    interleaved: "interleaved 1F1B",
    zero_bubble_h1: "zero bubble H1",
    zero_bubble_h2: "zero bubble H2",
    zb_v: "zero bubble V",
    aboutNaive: "The batch is not cut: one rank works at a time, and a forward of the batch takes as many units as there would "
      + "be microbatches.",
    aboutGpipe: "All forwards, then all backwards.",
    aboutOne_f_one_b: "After a few forwards, one forward and one backward in turn, so that fewer activations are kept.",
    aboutInterleaved: "1F1B with two stages on each rank, each of half the size: the pipeline fills twice as fast.",
    aboutZero_bubble_h1: "1F1B with the backward in two halves: I, which the rank before waits for, and W, which nobody waits "
      + "for and which fills gaps. No more activations than 1F1B's first rank.",
    aboutZero_bubble_h2: "As H1, with more forwards before the first backward: nearly twice the activations.",
    aboutZb_v: "Two stages on each rank, placed as a V: the last stage is with the first, on rank 0.",
    units: "One unit is the forward of a microbatch through a rank's whole share of the network. F, I and W take one each, the "
      + "whole backward B = I + W takes two; messages take no time.",
    workers: "Ranks",
    microbatches: "Microbatches",
    "ranks.one": "{n} rank",
    "ranks.other": "{n} ranks",
    "microbatches.one": "{n} microbatch",
    "microbatches.other": "{n} microbatches",
    "units.one": "{n} unit",
    "units.other": "{n} units",
    ahead: "Show the next step too",
    // the drawing
    lanesTitle: "{schedule}, {ranks}, {microbatches}",
    lanesAlt: "Timeline of one step, a row for each rank. The words and tables below say the same.",
    lanesBox: "Timeline. Arrow keys move between passes, up and down between ranks.",
    simulated: "simulated",
    measured: "measured: {name}",
    rank: "rank {n}",
    axis: "time, units",
    axisMeasured: "time, units (measured: 1 unit is {unit})",
    F: "forward",
    B: "backward, whole",
    I: "backward, input half",
    W: "backward, weight half",
    UPDATE: "update",
    legend: "{letter}: {words}",
    chunk: "small letters: the rank's second stage",
    coreShort: "waiting for a core",
    core: "waiting for a core",
    waited: "the pass whose message is needed",
    // one pass
    event: "{cell} on rank {rank}, measured: from {begin} to {end}, in units from {from} to {to}. ",
    eventCore: "For {core} of it the rank waited for a core. ",
    eventTwin: "Simulated from {begin} to {end}.",
    hint: "Point at a pass, or move with the arrow keys, to see what it waits for.",
    sayF: "forward",
    sayB: "backward, whole,",
    sayI: "input half of the backward",
    sayW: "weight half of the backward",
    pass: "{cell} on rank {rank}: {what} of microbatch {mb} on stage {stage}. Simulated from {begin} to {end}.",
    first: "It is the rank's first pass and waits for nothing.",
    waitedFor: "It waited for the message of {cell} on rank {rank}, which ended at {end}; its rank had nothing to do for {gap}.",
    busyUntil: "It waited for its own rank, busy with {cell} until {end}.",
    thereSince: "The message that it needs, of {cell} on rank {rank}, was there at {end}.",
    // the state in words
    hidden: "{schedule}, {ranks}, {microbatches}. The timeline is hidden until you show it.",
    sayStep: "{schedule}, {ranks}, {microbatches}, simulated: a step takes {period} (from one step to the next), of which {work} "
      + "are work and {bubble} are bubble, {share}. A step by itself takes {makespan} from its first start to its last end.",
    sayFormula: "The formula for the bubble, {formula}, gives {bubble}.",
    sayNoFormula: "The formula for the bubble, {formula}, holds only where {condition}.",
    sayPeak: "Activations stored at most, in microbatches, by rank: {list}.",
    sayMeasured: "Measured ({name}; {batch} samples a step): a step takes {step}, {units}, where a unit is the CPU time of a "
      + "forward, {unit}. Of the step {compute} is compute, {core} waiting for a core, {blocked} blocked by communication "
      + "(the bubble, and what a rank loses while another waits for a core) and {idle} idle. Simulated at the CPU times of its own passes, with a core for each rank: "
      + "{predicted}.",
    sayNotMeasured: "There is no measurement of this plan.",
    sizes: "Measurements of this schedule: {list}.",
    size: "{ranks} with {list} microbatches",
    noSizes: "There is no measurement of this schedule.",
    saySends: "All ranks together send {n} messages a step.",
    // formulas
    formulaNaive: "(p − 1)(F + B) of the whole batch",
    formulaGpipe: "(p − 1)(F + B)",
    formulaOne_f_one_b: "(p − 1)(F + B)",
    formulaInterleaved: "(p − 1)(F + B) / 2",
    formulaZero_bubble_h1: "(p − 1)(F + I − W)",
    formulaZero_bubble_h2: "(p − 1)(F + I − 2W)",
    formulaZb_v: "0",
    conditionInterleaved: "p divides m",
    conditionZero_bubble_h1: "m ≥ p",
    conditionZero_bubble_h2: "m ≥ 2p − 1",
    conditionZb_v: "m ≥ 2p − 1",
    // figures and tables
    factsTitle: "What it costs",
    byFormula: "formula",
    asSimulated: "simulated",
    asMeasured: "measured",
    rowPeriod: "a step of many, units",
    rowMakespan: "a step by itself, units",
    rowBubble: "bubble (measured: blocked or idle), units",
    rowShare: "the same, share of the step",
    rowCore: "waiting for a core, share",
    rowPeak: "stored activations by rank, microbatches",
    rowSeconds: "a step (simulated at the measured times of its passes)",
    rowMessages: "messages sent, all ranks",
    besideTitle: "Side by side, {ranks}, {microbatches}",
    columnSchedule: "schedule",
    columnPeriod: "units a step",
    columnMs: "measured step",
    columnShare: "bubble",
    columnPeak: "stored at most",
    columnMessages: "messages",
    none: "–",
    compareTitle: "All schedules, {ranks}, {microbatches}: units a step",
    compareAlt: "Work and bubble of a step by schedule, simulated, and measured under it.",
    work: "work",
    bubble: "bubble",
    blocked: "thin bars, measured: blocked or idle",
    notShown: "predict first",
    compareNote: "{period} ({share} bubble)",
    compareMeasured: "measured {period}",
    table: "The timeline as a table",
    tableCaption: "Every pass of a simulated step, in units",
    columnRank: "rank",
    columnPass: "pass",
    columnBegin: "begins",
    columnEnd: "ends",
    columnNeeds: "needs the message of",
    columnGap: "rank idle before",
    columnMeasured: "measured, begins to ends, units",
    needs: "{cell} on rank {rank}",
    // prediction
    predictTitle: "Your prediction first",
    predictDone: "Your prediction",
    predictHint: "How many units does a step of many take, from one step to the next, and what share of that is bubble, in which "
      + "a rank has nothing to do? (p ranks, m microbatches: each rank works 3m units a step.)",
    predictPeriod: "units a step",
    predictBubble: "bubble, %",
    show: "Show the timeline",
    skip: "Skip the predictions",
    again: "Predict again",
    predictFirst: "Type at least one prediction, or skip them.",
    predictNegative: "A prediction is not below 0.",
    predictedNothing: "You made no prediction for this one. A step takes {period}, of which {share} is bubble.",
    verdictPeriod: "You predicted {predicted}; a step takes {real}: {verdict}.",
    verdictBubble: "You predicted {predicted} of bubble; it is {real}: {verdict}.",
    right: "right",
    tooMany: "{n} too many",
    tooFew: "{n} too few",
    measureNote: "Measure runs the plan that is chosen above.",
    recordedOn: "recorded on {machine}, {date}",
    yours: "yours, on {machine}",
    about: "{network}; {data}; torch {torch}, bpkit {bpkit}; {repetitions} runs of {steps} steps, over {backend}",
  },
};

/** The words for `key`, its {names} filled in from `values`. */
export const say = (key, values) => fillIn(WORDS[language()]?.[key] ?? WORDS.en[key], values);

/** "1 rank", "33 units": the plural that the language asks for. */
export function sayCount(key, n) {
  const form = new Intl.PluralRules(language()).select(n);
  return say(`${key}.${form === "one" ? "one" : "other"}`, { n: number(n) });
}

/** The key of a word about a schedule: "about" and "zb_v" give "aboutZb_v". */
export const of = (what, name) => `${what}${name[0].toUpperCase()}${name.slice(1)}`;

const sayUnits = (n) => sayCount("units", n);

/** Which plan it is, for sentences and headings. */
export const naming = (view) => ({ schedule: say(view.name), ranks: sayCount("ranks", view.p),
  microbatches: sayCount("microbatches", view.m) });

/** A pass, and what it waited for: the message of a pass on another rank, or the passes before it on its own. */
export function describePass(view, pass) {
  const at = (time) => number(time);
  const { need, before } = pass;
  const parts = [say("pass", { ...pass, what: say(`say${pass.kind}`), begin: at(pass.begin), end: at(pass.end) })];
  if (pass.blocked) parts.push(say("waitedFor", { ...need, end: at(need.end), gap: sayUnits(pass.gap) }));
  else if (before) parts.push(say("busyUntil", { ...before, end: at(before.end) }));
  else parts.push(say("first"));
  if (need && !pass.blocked) parts.push(say("thereSince", { ...need, end: at(need.end) }));
  return parts.join(" ");
}

/** What the axis counts; with a measurement also what that is in milliseconds. */
export const describeAxis = (measured) => (measured ? say("axisMeasured", { unit: saySeconds(measured.unit) }) : say("axis"));

/** A measured pass, in milliseconds and in units, and where the simulation has it. */
export function describeEvent({ measured: { unit } }, event, twin) {
  const ms = (units) => saySeconds(units * unit, 1e-3);
  const away = event.cpu === null ? 0 : Math.max(0, event.end - event.begin - event.cpu);
  return say("event", { ...event, begin: ms(event.begin), end: ms(event.end), from: number(event.begin), to: number(event.end) })
    + (away * unit > 1e-6 ? say("eventCore", { core: ms(away) }) : "")
    + (twin ? say("eventTwin", { begin: number(twin.begin), end: number(twin.end) }) : "");
}

/** Of which sizes of the schedule there are measurements. */
export function describeSizes({ sizes }) {
  const list = sizes.map(([p, ms]) => say("size", { ranks: sayCount("ranks", p), list: ms.map((m) => number(m)).join(", ") }));
  return list.length ? say("sizes", { list: list.join("; ") }) : say("noSizes");
}

function describeFormula(view) {
  const formula = say(of("formula", view.name));
  const { bubble } = view.film.formula;
  if (bubble === null) return say("sayNoFormula", { formula, condition: say(of("condition", view.name)) });
  return say("sayFormula", { formula, bubble: sayUnits(bubble) });
}

function describeMeasured({ name, point, unit, shares, run }) {
  const share = (key) => sayPercent(shares[key]);
  return say("sayMeasured", { name, batch: number(run.experiment.batch), step: saySeconds(point.step_s.median),
    units: sayUnits(point.step_s.median / unit), unit: saySeconds(unit), compute: share("compute"),
    core: share("waiting_for_core"), blocked: share("exposed_communication"), idle: share("idle"),
    predicted: saySeconds(point.predicted_s, point.step_s.median) });
}

/** The whole state in words. */
export function describe(view) {
  if (!view.open) return [say("hidden", naming(view))];
  const { film, work, bubble, share } = view;
  return [say("sayStep", { ...naming(view), period: sayUnits(film.period), work: number(work), bubble: number(bubble),
    share: sayPercent(share), makespan: sayUnits(film.makespan) }), describeFormula(view),
  say("sayPeak", { list: film.peak.map((n) => number(n)).join(", ") }), say("saySends", { n: number(film.messages) }),
  view.measured ? describeMeasured(view.measured) : say("sayNotMeasured")];
}

function judge(off, close, words) {
  return Math.abs(off) < close ? say("right") : say(off > 0 ? "tooMany" : "tooFew", { n: words(Math.abs(off)) });
}

/** How far off the prediction was. */
export function describeError(view) {
  const { film, share, guess } = view;
  const real = { period: film.period, bubble: 100 * share };
  const percent = (n) => sayPercent(n / 100);
  const judged = [["period", "verdictPeriod", 1e-6, sayUnits], ["bubble", "verdictBubble", 0.5, percent]]
    .filter(([what]) => what in guess)
    .map(([what, key, close, words]) => say(key, { predicted: words(guess[what]), real: words(real[what]),
      verdict: judge(guess[what] - real[what], close, words) }));
  return judged.join(" ") || say("predictedNothing", { period: sayUnits(film.period), share: sayPercent(share) });
}
