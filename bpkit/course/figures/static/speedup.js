// The speedup curve against the ideal line, and the prediction that the reader drags into it.
import { say, number } from "./text.js";
import { svg, label, linear, ticks, redraw, panel, legend } from "./dom.js";

const MARGIN = { left: 36, right: 14, top: 10, bottom: 36 };

function plane(view, width) {
  const height = Math.round(Math.min(300, Math.max(220, width * 0.72)));
  const most = Math.max(2, ...view.counts);
  const drawn = view.revealed ? view.series.flatMap((one) => one.points.map((point) => point.speedup)) : [];
  // A prediction far beyond the ideal does not squeeze the plot: it stands at its edge.
  const guessed = Object.values(view.prediction).map((value) => Math.min(value, 1.5 * most));
  const top = Math.max(most, ...drawn, ...guessed) * 1.08;
  const x = linear([0, most], [MARGIN.left, width - MARGIN.right]);
  const y = linear([0, top], [height - MARGIN.bottom, MARGIN.top]);
  return { width, height, most, top, x, y, inverse: linear([height - MARGIN.bottom, MARGIN.top], [0, top]) };
}

function axes(view, { width, height, top, x, y }) {
  const base = height - MARGIN.bottom;
  const lines = ticks(top, 5).map((v) => [
    svg("line", { class: v === 0 ? "axis" : "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(v), y2: y(v) }),
    label(MARGIN.left - 7, y(v) + 4, number(v), { "text-anchor": "end", class: "tick" }),
  ]);
  const counts = view.counts.map((n) => label(x(n), base + 17, number(n),
    { "text-anchor": "middle", class: n === view.chosen ? "tick chosen" : "tick" }));
  const caption = label((MARGIN.left + width - MARGIN.right) / 2, height - 4, say("axisWorkers"),
    { "text-anchor": "middle", class: "tick" });
  return [...lines.flat(), ...counts, caption];
}

const path = (points) => points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)},${py.toFixed(1)}`).join("");

function curve(one, { x, y, top }, chosen) {
  const classes = `${one.kind}${one.simulated ? " simulated" : ""}`;
  const error = (point) => {
    // The quartiles of the step time, as speedups over the same serial time.
    const { median, q1, q3 } = point.step_s;
    if (!(q1 > 0 && q3 > q1)) return null;
    return svg("line", { class: `spread ${classes}`, x1: x(point.workers), x2: x(point.workers),
      y1: y((point.speedup * median) / q3), y2: y(Math.min(top, (point.speedup * median) / q1)) });
  };
  const marks = one.points.map((point) => svg("circle", {
    class: `mark ${one.kind}${point.simulated ? " simulated" : ""}`, cx: x(point.workers), cy: y(point.speedup),
    r: point.workers === chosen ? 6 : 4.5, "data-workers": point.workers, "data-speedup": point.speedup }));
  const line = svg("path", {
    class: `curve ${classes}`, d: path(one.points.map((p) => [x(p.workers), y(p.speedup)])) });
  return svg("g", { class: "series" }, line, ...one.points.map(error), ...marks);
}

function predicted(view, { x, y, top }) {
  const set = view.predictable.filter((n) => n in view.prediction);
  const high = (value) => y(Math.min(value, top));
  const line = set.length ? svg("path", { class: "curve prediction",
    d: path([[x(1), y(1)], ...set.map((n) => [x(n), high(view.prediction[n])])]) }) : null;
  const shown = view.revealed ? set : view.predictable;
  const diamonds = shown.map((n) => {
    const value = view.prediction[n] ?? n;
    const r = view.revealed ? 5 : 7;
    return svg("path", {
      class: `diamond prediction${n in view.prediction ? "" : " unset"}`, "data-workers": n, "data-speedup": value,
      d: `M${x(n)},${high(value) - r}l${r},${r}l${-r},${r}l${-r},${-r}z` });
  });
  return [line, ...diamonds].filter(Boolean);
}

function entries(view) {
  const lines = view.series.map((one) => [`line ${one.kind}${one.simulated ? " simulated" : ""}`, one.name]);
  const guessed = !view.revealed || Object.keys(view.prediction).length > 0;
  return [...(view.revealed ? lines : []), ...(guessed ? [["line prediction", say("prediction")]] : []),
    ["line ideal", say("ideal")]];
}

/** The panel. `onPredict(workers, speedup)` is called while the reader drags. */
export function speedupPanel(onPredict) {
  const { root, canvas, width } = panel("speedup", say("speedupTitle"), say("speedupAlt"));
  let view = null;
  let geometry = null;
  let held = null;

  // A press anywhere in the plot takes the nearest worker count, so that nobody has to hit a small diamond.
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const value = geometry.inverse(event.clientY - box.top);
    const ceiling = 2 * geometry.most;
    onPredict(held, Math.round(100 * Math.min(ceiling, Math.max(0.05, value))) / 100);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (view.revealed || !view.predictable.length) return;
    const at = event.clientX - canvas.getBoundingClientRect().left;
    held = view.predictable.reduce((best, n) =>
      (Math.abs(geometry.x(n) - at) < Math.abs(geometry.x(best) - at) ? n : best));
    canvas.setPointerCapture(event.pointerId);
    place(event);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => { if (held !== null) place(event); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });

  root.append(legend([]));
  return { root, draw(next) {
    view = next;
    geometry = plane(view, width());
    const { x, y, most, height } = geometry;
    const at = x(view.chosen);
    canvas.classList.toggle("predicting", !view.revealed);
    redraw(canvas, geometry.width, height, ...axes(view, geometry),
      svg("line", { class: "guide", x1: at, x2: at, y1: MARGIN.top, y2: height - MARGIN.bottom }),
      svg("path", { class: "curve ideal", d: path([[x(0), y(0)], [x(most), y(most)]]) }),
      view.revealed ? view.series.map((one) => curve(one, geometry, view.chosen)) : null,
      predicted(view, geometry));
    root.lastChild.replaceWith(legend(entries(view)));
  } };
}
