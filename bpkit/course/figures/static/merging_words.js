// The words of the merging explorer alone; those that all figures share stand in text.js.
import { language, fillIn, sayCount, number } from "./text.js";

const WORDS = {
  en: {
    title: "Ways to merge, step by step",
    algorithm: "Algorithm",
    server: "star",
    sharded_server: "a star for each part",
    tree: "binary tree",
    binomial: "binomial tree",
    ring: "ring",
    halving_doubling: "halving-doubling",
    hierarchical: "hierarchy of two hosts",
    aboutServer: "Rank 0 adds what the others send, one after the other, and sends the sum back to each.",
    aboutSharded_server: "Each rank is the middle of a star for one part: it adds what the others send of it, and sends it back.",
    aboutTree: "The children of rank r are ranks 2r + 1 and 2r + 2. Sums go up to rank 0, then the result comes down.",
    aboutBinomial: "In each round half of the ranks that are left give all they have to the other half, until rank 0 has the "
      + "sum; then the same way back, each round to as many as have it already.",
    aboutRing: "Each rank sends to the next one only, a part a step: first to be added, then to be copied.",
    aboutHalving_doubling: "Ranks exchange half of the buffer with a partner, then a quarter with another, and so on; "
      + "then the same way back. (If their number is no power of two, some first give all they have to a neighbour.)",
    aboutHierarchical: "Ranks 0 to {last} are on one host, the others on a second. A ring in each host adds; a ring across "
      + "the hosts completes each part; a ring in each host copies.",
    setting: "{workers}, each with {size} of its own. Ranks and parts are counted from 0.",
    // the drawing
    stripsAlt: "The buffer of each rank as a strip of parts, and the messages of this step. The text below says the same.",
    stripsHeading: "What each rank holds {when}",
    whenStart: "at the start",
    whenAfter: "after step {step} of {last}",
    rank: "rank {n}",
    partTick: "part {n}",
    sent: "sent",
    all: "all",
    contribution: "a rank's contribution: the highest stripe is rank 0's, the next rank 1's, … (Σ5: five of them)",
    wholeSum: "the sum of all ranks",
    changed: "changed in this step",
    message: "a message of this step",
    // words for what is drawn
    partOf: "part {low} of {parts}",
    partsOf: "parts {low} to {high} of {parts}",
    wholeBuffer: "the whole buffer",
    own: "rank {n} alone",
    sumOf: "sum of ranks {list}",
    cell: "rank {rank}, {part}: {holding}",
    start: "Start: every rank holds its own contribution alone, in every part.",
    hidden: "The steps are hidden until you show them.",
    stepNow: "Step {step} of {last}.",
    moveAdd: "Rank {source} sends {part} ({bytes}) to rank {to}, which adds it: now the {holding}.",
    moveCopy: "Rank {source} sends {part} ({bytes}) to rank {to}, which puts it in place of its own: now the {holding}.",
    bytes: "{n}\u00a0B",
    sentSoFar: "Sent so far: {list}.",
    sentBy: "rank {rank} {bytes}",
    done: "Every rank now holds the whole sum.",
    table: "The same as a table",
    tableCaption: "What each rank holds {when}, and what it has sent so far",
    columnRank: "rank",
    columnSent: "sent so far",
    // stepping
    stepping: "Step",
    reset: "To the start",
    back: "Back",
    forward: "Forward",
    play: "Play",
    pause: "Pause",
    // prediction
    predictTitle: "Your prediction first",
    predictDone: "Your prediction",
    predictHint: "In one step a rank sends at most one message and receives at most one. How many steps does it take until "
      + "every rank holds the whole sum, and how many bytes does rank 0 send on the way?",
    predictSteps: "steps",
    predictBytes: "bytes sent by rank 0",
    show: "Show the steps",
    skip: "Skip this prediction",
    again: "Predict again",
    predictFirst: "Type at least one prediction, or skip it.",
    predictNegative: "A prediction is not below 0.",
    predictedNothing: "You made no prediction for this one. It takes {steps}, and rank 0 sends {bytes}.",
    verdictSteps: "You predicted {predicted} steps; it takes {real}: {verdict}.",
    verdictBytes: "You predicted that rank 0 sends {predicted} bytes; it sends {real}: {verdict}.",
    right: "right",
    tooMany: "{n} too many",
    tooFew: "{n} too few",
  },
};

/** The words for `key`, its {names} filled in from `values`. */
export const say = (key, values) => fillIn(WORDS[language()]?.[key] ?? WORDS.en[key], values);

/** Bytes to the last one, since they are counted: "5,040 B". */
export const sayExactly = (bytes) => say("bytes", { n: number(bytes) });

/** "part 1 of 4", "parts 0 to 1 of 4", "the whole buffer". */
export function sayPart(low, high, parts) {
  if (high - low === parts) return say("wholeBuffer");
  return say(high - low === 1 ? "partOf" : "partsOf", { low, high: high - 1, parts });
}

/** Whose contributions a part holds: "sum of ranks 0, 1". */
export const sayHolding = (members) =>
  (members.length === 1 ? say("own", { n: members }) : say("sumOf", { list: [...members].join(", ") }));

export const sayWhen = ({ step, last }) => say(step ? "whenAfter" : "whenStart", { step, last });

function sayMove([source, to, low, high, bytes, adds], view) {
  const held = view.frame[to].slice(low, high);
  const holding = [...new Set(held)].map(sayHolding).join(", ");
  const part = sayPart(low, high, view.film.parts);
  return say(adds ? "moveAdd" : "moveCopy", { source, to, part, bytes: sayExactly(bytes), holding });
}

/** The whole state in words: a headline, and a sentence for each message of the step. */
export function describe(view) {
  if (!view.open) return [say("start"), say("hidden")];
  if (!view.step) return [say("start")];
  const list = view.sent.map((bytes, rank) => say("sentBy", { rank, bytes: sayExactly(bytes) })).join(", ");
  return [say("stepNow", view), ...view.moves.map((move) => sayMove(move, view)), say("sentSoFar", { list }),
    ...(view.step === view.last ? [say("done")] : [])];
}

function verdict(predicted, real) {
  if (predicted === real) return say("right");
  return say(predicted > real ? "tooMany" : "tooFew", { n: number(Math.abs(predicted - real)) });
}

/** How far off the prediction was. */
export function describeError({ guess, last, total }) {
  const judged = [["steps", "verdictSteps", last], ["bytes", "verdictBytes", total]].filter(([what]) => what in guess);
  if (!judged.length) return say("predictedNothing", { steps: sayCount("steps", last), bytes: sayExactly(total) });
  return judged.map(([what, key, real]) =>
    say(key, { predicted: number(guess[what]), real: number(real), verdict: verdict(guess[what], real) })).join(" ");
}
