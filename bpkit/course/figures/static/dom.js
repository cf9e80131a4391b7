// The few lines that draw: elements, a linear scale, round ticks. There is no library underneath.
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const html = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Text inside a drawing. */
export function label(x, y, content, attributes = {}) {
  return svg("text", { x, y, ...attributes }, content);
}

/** A map from the interval `from` to the interval `to`. */
export function linear([from0, from1], [to0, to1]) {
  const slope = from1 === from0 ? 0 : (to1 - to0) / (from1 - from0);
  return (x) => to0 + (x - from0) * slope;
}

/** Round values from 0 to `max`, about `wanted` of them. */
export function ticks(max, wanted = 4) {
  if (!(max > 0)) return [0];
  const raw = max / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw * 0.999);
  const values = [];
  for (let i = 0; i * step <= max * 1.0001; i += 1) values.push(i * step);
  return values;
}

/** Give `canvas` its size in pixels and redraw it: one unit is one pixel, so type keeps its size. */
export function redraw(canvas, width, height, ...children) {
  canvas.setAttribute("width", width);
  canvas.setAttribute("height", height);
  canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
  canvas.replaceChildren(...children.flat().filter(Boolean));
}

/** A panel: a titled figure with an empty drawing in it, which `draw(canvas, width)` fills. */
export function panel(name, title, alt) {
  const canvas = svg("svg", { role: "img", "aria-label": alt });
  const heading = html("figcaption", {}, title);
  const root = html("figure", { class: `bpkit-panel bpkit-${name}` }, heading, canvas);
  return { root, canvas, heading, width: () => Math.max(220, Math.floor(root.clientWidth)) };
}

/** A box in which what is too wide or too long is scrolled, with the keyboard too. */
export function scrolling(name, ...children) {
  return html("div", { class: "bpkit-scroll", tabindex: "0", role: "region", "aria-label": name }, ...children);
}

/** A legend: swatches with words, drawn as HTML so that it wraps. */
export function legend(entries) {
  const swatch = (kind) => html("i", { class: `bpkit-swatch ${kind}`, "aria-hidden": "true" });
  return html("ul", { class: "bpkit-legend" }, ...entries.map(([kind, words]) => html("li", {}, swatch(kind), words)));
}

/** Change several values of a model at once. */
export function write(model, changes) {
  for (const [name, value] of Object.entries(changes)) model.set(name, value);
  model.save_changes();
}

/** What a figure exports as `render`: `build(model, live)` makes {root, draw}, which is drawn for each new state or width.
    `live` is false on a page without a kernel; the loader of the book says so, Jupyter does not pass it. */
export const renderer = (build) => ({ model, el, live = true }) => {
  const figure = build(model, live);
  const draw = () => figure.draw();
  let width = -1;
  const watcher = new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now !== width && now > 0) { width = now; draw(); }
  });
  el.append(figure.root);
  draw();
  watcher.observe(figure.root);
  model.on("change", draw);
  return () => { watcher.disconnect(); model.off("change", draw); figure.close?.(); };
};
