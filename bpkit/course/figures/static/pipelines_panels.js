// What stands beside the timeline: the choices, the prediction, the costs, all schedules beside each other, and tables.
import { sayPercent, saySeconds, number } from "./text.js";
import { html, svg, label, linear, redraw, panel, legend, scrolling } from "./dom.js";
import { workerSlider } from "./controls.js";
import { say, sayCount, of, naming, describe, describeSizes } from "./pipelines_words.js";

// JupyterLab takes arrow keys and letters for its own commands unless the input itself says no.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };

export function choicePanel(onChange) {
  const select = html("select", KEEP_KEYS);
  const pick = html("label", { class: "bpkit-select" }, html("span", {}, say("schedule")), select);
  const ranks = workerSlider((workers) => onChange({ workers }), say("workers"), (n) => sayCount("ranks", n));
  const cuts = workerSlider((microbatches) => onChange({ microbatches }), say("microbatches"),
    (n) => sayCount("microbatches", n));
  const about = html("p", { class: "bpkit-about" });
  const root = html("div", { class: "bpkit-choices" }, pick, about, ranks.root, cuts.root);
  let names = [];
  select.addEventListener("change", () => onChange({ schedule: names[select.selectedIndex] }));
  return { root, draw(view) {
    if (names.join() !== view.names.join()) {
      names = view.names;
      select.replaceChildren(...names.map((name) => html("option", {}, say(name))));
    }
    select.selectedIndex = names.indexOf(view.name);
    ranks.draw({ counts: view.workers, chosen: view.p });
    cuts.draw({ counts: view.microbatches, chosen: view.m });
    about.textContent = `${say(of("about", view.name))} ${say("units")} ${describeSizes(view)}`;
  } };
}

export function aheadSwitch(onChange) {
  const input = html("input", { type: "checkbox", ...KEEP_KEYS });
  input.addEventListener("change", () => onChange(input.checked));
  const root = html("label", { class: "bpkit-ahead" }, input, say("ahead"));
  return { root, draw(view) { input.checked = view.ahead; } };
}

const listed = (values) => values.map((n) => number(n)).join(", ");

// Rows of [heading, formula, simulated, measured]; null where there is none.
function factsOf({ film, work, bubble, share, measured }) {
  const { bubble: known, peak } = film.formula;
  const units = (seconds) => number(seconds / measured.unit);
  const got = (value) => (measured ? value() : null);
  const step = measured?.point.step_s.median;
  return [
    ["rowPeriod", known === null ? null : number(work + known), number(film.period), got(() => units(step))],
    ["rowBubble", known === null ? null : number(known), number(bubble), got(() => units(step * measured.bubble))],
    ["rowShare", known === null ? null : sayPercent(known / (work + known)), sayPercent(share),
      got(() => sayPercent(measured.bubble))],
    ["rowMakespan", null, number(film.makespan), null],
    ["rowPeak", peak && listed(peak), listed(film.peak), null],
    ["rowMessages", null, number(film.messages), null],
    ...(measured ? [["rowCore", null, null, sayPercent(measured.shares.waiting_for_core)],
      ["rowSeconds", null, saySeconds(measured.point.predicted_s, step), saySeconds(step)]] : []),
  ];
}

function table(caption, columns, rows) {
  const head = columns.map((words) => html("th", { scope: "col" }, words));
  const line = ([name, ...values]) => html("tr", {}, html("th", { scope: "row" }, name),
    ...values.map((value) => html("td", {}, value ?? say("none"))));
  return html("table", {}, html("caption", {}, caption), html("thead", {}, html("tr", {}, ...head)),
    html("tbody", {}, ...rows.map(line)));
}

/** Formula, simulation and measurement side by side. */
export function factsPanel() {
  const place = scrolling(say("factsTitle"));
  const about = html("p", { class: "bpkit-about" });
  const root = html("div", { class: "bpkit-facts" }, place, about);
  return { root, draw(view) {
    const columns = ["", say("byFormula"), say("asSimulated"), ...(view.measured ? [say("asMeasured")] : [])];
    const rows = factsOf(view).map(([key, ...values]) => [say(key), ...values.slice(0, columns.length - 1)]);
    const made = table(say("factsTitle"), columns, rows);
    made.querySelector("th").replaceWith(html("td"));
    place.replaceChildren(made);
    const run = view.measured?.run;
    about.textContent = run ? say("about", { ...run.machine, ...run.experiment }) : "";
  } };
}

const BAR = 13;
const THIN = 7;
const NAMES = 108; // pixels
const NOTES = 112;

function stack(parts, x, y, tall) {
  let at = 0;
  return parts.map(([kind, length]) => {
    const rect = svg("rect", { class: `part ${kind}`, x: x(at), y, width: x(length) - x(0), height: tall, "data-value": length });
    at += length;
    return rect;
  });
}

function measuredBar({ period, shares, bubble }, x, y) {
  const parts = [["work", shares.compute], ["core", shares.waiting_for_core], ["blocked", bubble]];
  return [...stack(parts.map(([kind, share]) => [kind, share * period]), x, y, THIN),
    label(x(period) + 6, y + THIN + 1, say("compareMeasured", { period: number(period) }), { class: "value" })];
}

function compareRow(one, view, x, y) {
  const group = { class: one.name === view.name ? "beside chosen" : "beside", "data-schedule": one.name };
  const name = label(0, y + BAR - 2, say(one.name), { class: "tick" });
  if (!one.open) return svg("g", group, name, label(NAMES, y + BAR - 2, say("notShown"), { class: "value" }));
  const note = say("compareNote", { period: number(one.period), share: sayPercent(one.share) });
  return svg("g", group, name, stack([["work", one.work], ["bubble", one.bubble]], x, y, BAR),
    label(x(one.period) + 6, y + BAR - 2, note, { class: "value" }),
    one.measured ? measuredBar(one.measured, x, y + BAR + 3) : null);
}

function tableOfAll(view, open) {
  const columns = ["columnSchedule", "columnPeriod", "columnMs", "columnShare", "columnPeak", "columnMessages"].map((key) => say(key));
  const rows = open.map((one) => [say(one.name), number(one.period), one.measured && saySeconds(one.measured.point.step_s.median),
    sayPercent(one.share), number(one.peak), number(one.messages)]);
  return table(say("besideTitle", naming(view)), columns, rows);
}

/** Work and bubble of each schedule whose answer is shown; what was measured of it under that. */
export function comparePanel() {
  const { root, canvas, heading, width } = panel("compare", "", say("compareAlt"));
  const key = html("div");
  const place = scrolling(say("compareAlt"));
  root.append(key, place);
  return { root, draw(view) {
    heading.textContent = say("compareTitle", naming(view));
    const open = view.beside.filter((one) => one.open);
    const longest = Math.max(...open.flatMap((one) => [one.period, one.measured?.period ?? 0]));
    const x = linear([0, longest], [NAMES, Math.max(NAMES + 40, width() - NOTES)]);
    const measured = open.some((one) => one.measured);
    const tall = measured ? BAR + THIN + 13 : BAR + 9;
    redraw(canvas, width(), 4 + view.beside.length * tall, ...view.beside.map((one, i) => compareRow(one, view, x, 4 + i * tall)));
    place.replaceChildren(tableOfAll(view, open));
    key.replaceChildren(legend([["work", say("work")], ["bubble", say("bubble")],
      ...(measured ? [["core", say("coreShort")], ["blocked", say("blocked")]] : [])]));
  } };
}

function tableOfPasses(view) {
  const found = new Map((view.measured?.events ?? []).map((one) => [`${one.rank}/${one.cell}`, one]));
  const span = (one) => (one ? `${number(one.begin)} – ${number(one.end)}` : null);
  const columns = ["columnPass", "columnRank", "columnBegin", "columnEnd", "columnNeeds", "columnGap",
    ...(view.measured ? ["columnMeasured"] : [])].map((key) => say(key));
  const rows = view.passes.map((pass) => [pass.cell, number(pass.rank), number(pass.begin), number(pass.end),
    pass.need && say("needs", pass.need), number(pass.gap),
    ...(view.measured ? [span(found.get(`${pass.rank}/${pass.cell}`))] : [])]);
  return table(say("tableCaption"), columns, rows);
}

/** The text equivalent: sentences, and every pass as a row. */
export function wordsPanel() {
  const sentences = html("div", { class: "bpkit-words", role: "status" });
  const place = scrolling(say("table"));
  const more = html("details", { class: "bpkit-more" }, html("summary", {}, say("table")), place);
  return { root: html("div", {}, sentences, more), draw(view) {
    const said = describe(view);
    // Written only when it differs, so that a redraw for a new width is not announced again.
    if ([...sentences.children].map((p) => p.textContent).join("\n") !== said.join("\n")) {
      sentences.replaceChildren(...said.map((words) => html("p", {}, words)));
    }
    more.hidden = !view.open;
    place.replaceChildren(...(view.open ? [tableOfPasses(view)] : []));
  } };
}
