// The buffers of all ranks as strips of parts, and the messages of one step as arrows between them.
import { svg, label, redraw, panel, legend } from "./dom.js";
import { say, sayPart, sayHolding, sayWhen, sayExactly } from "./merging_words.js";

const TOP = 20;
const ROW = 42;
const BAR = 20;
const LEFT = 50;
const RIGHT = 68;
const CHARACTER = 6.4;
const WORDS_SHARE = 0.55; // the rest of a part's line is left to arrows

const barTop = (rank) => TOP + rank * ROW;

// A part has a stripe for each rank, one below the other, filled where it holds that rank's contribution: to the right
// there are only other parts.
function drawPart({ chosen, film }, rank, part, members, changed, place) {
  const whole = members.length === chosen;
  const y = barTop(rank);
  const tall = BAR / chosen;
  const marks = [...members].map((member) => svg("rect", { class: "contribution", "data-of": member,
    x: place.x, y: y + Number(member) * tall, width: place.wide, height: tall }));
  const named = whole ? say("all") : members;
  // Who is in it, or where that is too long how many are.
  const short = [named, `Σ${members.length}`].find((text) => text.length * CHARACTER < WORDS_SHARE * place.wide);
  const cell = { rank, part: sayPart(part, part + 1, film.parts), holding: sayHolding(members) };
  return svg("g", { class: `cell${whole ? " whole" : ""}${changed ? " changed" : ""}`,
    "data-rank": rank, "data-part": part, "data-holds": members },
  ...marks, svg("rect", { class: "frame", x: place.x, y, width: place.wide, height: BAR }),
  short && members ? label(place.x + 2, y + BAR + 12, short, { class: "value" }) : null,
  svg("title", {}, say("cell", cell)));
}

// Arrows of messages with the same parts stand side by side in the last of them, to the right of the words under it.
function drawMove([source, to, low, high], at, of, x, wide) {
  const down = to > source;
  const share = WORDS_SHARE + (1 - WORDS_SHARE) * ((at + 0.5) / of);
  const middle = x(high - 1) + wide * share;
  const from = barTop(source) + (down ? BAR : 0);
  const tip = barTop(to) + (down ? 0 : BAR);
  const base = tip + (down ? -7 : 7);
  const line = (name) => svg("line", { class: name, x1: middle, x2: middle, y1: from, y2: base });
  return svg("g", { class: "move", "data-from": source, "data-to": to, "data-parts": `${low}:${high}` },
    line("halo"), line("shaft"), svg("polygon", { points: `${middle - 5},${base} ${middle + 5},${base} ${middle},${tip}` }));
}

function drawMoves(view, x, wide) {
  const span = ([, , low, high]) => `${low}:${high}`;
  return view.moves.map((move) => {
    const beside = view.moves.filter((other) => span(other) === span(move));
    return drawMove(move, beside.indexOf(move), beside.length, x, wide);
  });
}

const touched = (view, rank, part) =>
  view.moves.some(([, to, low, high]) => to === rank && low <= part && part < high);

export function stripsPanel() {
  const { root, canvas, heading, width } = panel("strips", "", say("stripsAlt"));
  root.append(legend([["contribution", say("contribution")], ["whole", say("wholeSum")], ["changed", say("changed")],
    ["message", say("message")]]));
  return { root, draw(view) {
    heading.textContent = say("stripsHeading", { when: sayWhen(view) });
    const { parts } = view.film;
    const right = width() - RIGHT;
    const wide = (right - LEFT) / parts;
    const x = (part) => LEFT + part * wide;
    const ticks = parts < 2 ? [] : view.frame[0].map((_, part) =>
      label(x(part) + 2, TOP - 7, wide > 46 ? say("partTick", { n: part }) : part, { class: "tick" }));
    const rows = view.frame.flatMap((row, rank) => [
      label(0, barTop(rank) + BAR - 5, say("rank", { n: rank }), { class: "tick" }),
      ...row.map((members, part) => drawPart(view, rank, part, members, touched(view, rank, part),
        { x: x(part), wide: wide - 3 })),
      label(width(), barTop(rank) + BAR - 5, sayExactly(view.sent[rank]), { class: "tick sent", "text-anchor": "end" }),
    ]);
    const caption = label(width(), TOP - 7, say("sent"), { class: "tick", "text-anchor": "end" });
    redraw(canvas, width(), barTop(view.chosen) - 4, ...ticks, caption, ...rows, ...drawMoves(view, x, wide));
  } };
}
