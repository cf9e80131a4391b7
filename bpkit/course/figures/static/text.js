// The words of the figures stand here, or in a "_words" module those of one figure alone, and nowhere else: a translation
// is one more catalogue.
const NBSP = "\u00a0"; // a number is not parted from its unit

const CATALOGUES = {
  en: {
    title: "How much faster with more workers?",
    experiment: "{network}, {data}; {plan}; {scaling}; {batch}",
    batchStrong: "global batch {n}",
    batchWeak: "batch {n} a worker",
    strong: "strong scaling",
    weak: "weak scaling",
    strongHint: "strong: fixed global batch",
    weakHint: "weak: fixed batch a worker",
    scaling: "Scaling",
    measurement: "Recorded run",
    workersLabel: "Workers",
    "workers.one": "{n} worker",
    "workers.other": "{n} workers",
    "steps.one": "{n} step",
    "steps.other": "{n} steps",
    empty: "There is no measurement yet.",
    // series
    recorded: "recorded on {machine}",
    own: "yours, on {machine}",
    ownRun: "yours, run {n}, on {machine}",
    simulatedSuffix: "{name} (simulated)",
    ideal: "ideal: n workers, n times as fast",
    prediction: "your prediction",
    // panels
    speedupTitle: "Speedup over the best serial run",
    speedupAlt: "Speedup against the number of workers. The text below says the same in words.",
    partsTitle: "Where the time of a step goes",
    partsAlt: "Time of one step by worker count, split into its parts.",
    bytesTitle: "Bytes sent, each worker",
    bytesAlt: "Bytes sent by worker count.",
    throughputTitle: "Samples a second",
    throughputAlt: "Throughput by worker count.",
    accuracyTitle: "Time to {accuracy} accuracy",
    accuracyTitlePlain: "Time to target accuracy",
    accuracyAlt: "Time to target accuracy by worker count.",
    timelineTitle: "One step with {workers} ({name})",
    timelineAlt: "Timeline of one training step, a row for each rank.",
    timelineNone: "No timeline was recorded with {workers}.",
    axisWorkers: "workers",
    axisSpeedup: "speedup",
    rank: "rank {n}",
    // parts of a step
    compute: "compute",
    waiting_for_core: "waiting for a core",
    exposed_communication: "exposed communication",
    idle: "idle",
    hidden_communication: "hidden communication",
    notCounted: "not counted; payload {bytes}",
    payload: "payload (sends are not counted)",
    notReached: "not reached",
    notMeasured: "not measured",
    // kinds of action in the timeline
    forward: "forward (F)",
    backward: "backward (B)",
    input_half: "input half (I)",
    weight_half: "weight half (W)",
    communication: "communication",
    update: "update",
    other: "loss and other",
    wait: "blocked by communication",
    event: "rank {rank}: {cell}, {length} from {start}",
    eventWait: "; for {wait} of it the rank is blocked",
    eventCore: "; for {core} it waits for a core",
    // prediction
    predictTitle: "Your prediction first",
    predictDone: "Your prediction",
    predictHint: "Drag each diamond, or type: how many times as fast as one worker will the step be?",
    show: "Show the measurement",
    skip: "Skip the prediction",
    again: "Predict again",
    predictFirst: "Set at least one prediction, or skip it.",
    predictPositive: "A prediction is a number above 0, such as 0.8 or 1.8.",
    predictedNothing: "You made no prediction.",
    predictedOne: "With {workers} you predicted {predicted}, measured {measured}: {verdict}.",
    tooHigh: "{difference} too high ({percent})",
    tooLow: "{difference} too low ({percent})",
    exact: "right, to two digits",
    predictedMean: "On average you were {percent} off.",
    comparedWith: "Compared with “{name}”.",
    hiddenState: "The measurement is hidden until you show it. ",
    hiddenPrediction: "Your prediction so far: {list}.",
    hiddenNone: "You have predicted nothing yet.",
    // text equivalent
    say: "{workers} ({name}): {speedup} as fast as the best serial run; ideal is {ideal}, so the efficiency "
      + "is {efficiency}. A step takes {step}: {parts}. ",
    sayHidden: "Another {hidden} of communication is hidden under compute. ",
    sayBytes: "Each worker sends {bytes} a step. ",
    sayNotCounted: "Bytes sent are not counted ({algorithm}); the payload is {payload} a step. ",
    sayThroughput: "Throughput is {throughput} samples a second; {accuracy}.",
    sayReached: "{target} test accuracy takes {time} ({steps})",
    sayTime: "the target accuracy takes {time}",
    sayNotReached: "{target} test accuracy was not reached",
    sayNotMeasured: "time to a target accuracy was not measured",
    saySimulated: "These figures are simulated, not measured. ",
    noPoint: "{name} has no point for {workers}. ",
    table: "The same as a table",
    besideTitle: "All recorded runs, {workers}",
    columnRun: "run",
    columnPayload: "payload, a worker and step",
    columnMemory: "memory kept, a worker",
    tableTimeline: "The timeline as a table",
    rowSpeedup: "speedup",
    rowEfficiency: "efficiency",
    rowStep: "step, median",
    rowSpread: "step, quartiles",
    rowHidden: "hidden communication",
    rowBytes: "bytes sent, a worker and step",
    rowThroughput: "samples a second",
    rowAccuracy: "time to target accuracy",
    columnRank: "rank",
    columnAction: "action",
    columnStart: "start",
    columnEnd: "end",
    columnWait: "blocked",
    // measuring
    measure: "Measure on this machine",
    measureAgain: "Measure again",
    stop: "Stop",
    progressLabel: "Progress of the measurement",
    phaseStarting: "Starting the workers …",
    phaseStopping: "Stopping …",
    phaseStopped: "Stopped; nothing was added.",
    phaseMeasured: "Measured.",
    phaseMeasuredHidden: "Measured. Make your prediction, then show it.",
    phaseFailed: "The measurement failed.",
    nothingToShow: "There is nothing to show yet: measure first.",
    noAnswer: "The kernel does not answer. Run the cell of this figure again.",
    noKernel: "This page shows recorded runs. To measure on your own machine, clone the project, type "
      + "“make lab”, and run this figure there.",
    noNetwork: "To measure here, give the figure a network and data: "
      + "bp.course.explorer(..., network=net, data=data).",
    machine: "{name}; {date}",
    machineLong: "{name}; {cpu}, {cores}; {date}",
    noise: "The same work against itself took {low} to {high} as long (95 %).",
    steal: "The machine's host kept {share} of the CPU time for others.",
    "cores.one": "{n} core",
    "cores.other": "{n} cores",
  },
};

const pageLanguage = () => (document.documentElement.lang || "en").split("-")[0];

/** The language whose catalogue is used: the page's own, if we have it. */
export function language() {
  return pageLanguage() in CATALOGUES ? pageLanguage() : "en";
}

/** The words for `key`, its {names} filled in from `values`. */
export function say(key, values = {}) {
  return fillIn(CATALOGUES[language()][key] ?? CATALOGUES.en[key] ?? key, values);
}

/** A pattern with its {names} filled in from `values`. */
export function fillIn(pattern, values = {}) {
  return pattern.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** "1 worker", "4 workers": the plural that the language asks for. */
export function sayCount(key, n) {
  const form = new Intl.PluralRules(language()).select(n);
  const known = `${key}.${form}` in CATALOGUES[language()];
  return say(`${key}.${known ? form : "other"}`, { n: number(n) });
}

export function number(x, digits = 3) {
  const maximumSignificantDigits = Math.max(digits, wholeDigits(x));
  return new Intl.NumberFormat(language(), { maximumSignificantDigits }).format(x);
}

// A count such as 12,345 keeps its digits; only what stands after the point is rounded.
function wholeDigits(x) {
  return Math.abs(x) >= 1 ? Math.floor(Math.log10(Math.abs(x))) + 1 : 1;
}

export const sayTimes = (x) => `${new Intl.NumberFormat(language(),
  { minimumFractionDigits: 2, maximumFractionDigits: 2 }).format(x)}×`;
export const sayPercent = (x) => `${number(Math.round(100 * x))}${NBSP}%`;

/** A duration given in seconds. Figures that are compared share the unit and the decimals of `like`. */
export function saySeconds(s, like = s) {
  const size = Math.abs(like) || 1e-3;
  const [scale, unit] = [[1, "s"], [1e3, "ms"], [1e6, "µs"]].find(([k]) => size * k >= 1) ?? [1e6, "µs"];
  const maximumFractionDigits = Math.max(0, 2 - Math.floor(Math.log10(size * scale)));
  return `${new Intl.NumberFormat(language(), { maximumFractionDigits }).format(s * scale)}${NBSP}${unit}`;
}

/** An amount of bytes, in decimal units. */
export function sayBytes(b) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (Math.abs(b) >= 1000 && at < units.length - 1) { b /= 1000; at += 1; }
  return `${number(b)}${NBSP}${units[at]}`;
}
