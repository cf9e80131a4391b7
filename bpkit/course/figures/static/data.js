// From the synced state to what is to be drawn. No drawing here, and no state: one pure function of the model.
import { say } from "./text.js";

export const PARTS = ["compute", "waiting_for_core", "exposed_communication", "idle"];

const scalingOf = (measurement) => measurement.experiment.scaling ?? "strong";

/** Recorded runs of one experiment on one machine belong together: a group holds its strong and its weak run. */
export function groupsOf(recorded) {
  const groups = new Map();
  for (const measurement of recorded) {
    const { machine, experiment } = measurement;
    const parts = [experiment.plan, experiment.backend, experiment.network, machine.name];
    const key = parts.filter(Boolean).join(" · ");
    if (!groups.has(key)) groups.set(key, { title: key, parts, machine, modes: {} });
    groups.get(key).modes[scalingOf(measurement)] ??= measurement;
  }
  return shortened([...groups.values()]);
}

// Names differ at the front and say nothing that all have in common: the plan first, the machine last.
function shortened(groups) {
  const differ = [0, 1, 2, 3].filter((i) => new Set(groups.map((group) => group.parts[i])).size > 1);
  const shown = differ.length ? differ : [0];
  return groups.map((group) => ({ ...group, short: shown.map((i) => group.parts[i]).filter(Boolean).join(" · ") }));
}

function seriesOf(measurement, kind, name) {
  const simulated = measurement.points.every((point) => point.simulated);
  const points = [...measurement.points].sort((a, b) => a.workers - b.workers);
  return {
    kind, measurement, points, simulated,
    name: simulated ? say("simulatedSuffix", { name }) : name,
    at: (workers) => points.find((point) => point.workers === workers) ?? null,
  };
}

function ownSeries(runs, mode) {
  const fitting = runs.filter((run) => scalingOf(run) === mode);
  return fitting.map((run, i) => seriesOf(run, "own",
    say(fitting.length > 1 ? "ownRun" : "own", { n: i + 1, machine: run.machine.name })));
}

const nearest = (values, wanted) =>
  values.reduce((best, value) => (Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best), values[0]);

/** Everything that the panels need, read from the model at one moment. */
export function viewOf(model, live) {
  const groups = groupsOf(model.get("recorded"));
  const own = model.get("own");
  const group = groups[Math.min(model.get("choice"), groups.length - 1)] ?? null;
  const present = new Set([...Object.keys(group?.modes ?? {}), ...own.map(scalingOf)]);
  const modes = ["strong", "weak"].filter((mode) => present.has(mode));
  const mode = modes.includes(model.get("scaling")) ? model.get("scaling") : modes[0] ?? "strong";
  const recorded = group?.modes[mode];
  const owned = ownSeries(own, mode);
  const name = say("recorded", { machine: group?.machine.name });
  const series = [...(recorded ? [seriesOf(recorded, "recorded", name)] : []), ...owned];
  // The other recorded runs of the same kind of scaling, for the table in which they stand side by side.
  const beside = groups.filter((one) => one.modes[mode]).map((one) => seriesOf(one.modes[mode], "recorded", one.short));
  // Bars are drawn for the recorded run and for the reader's latest; earlier ones stay in the curve.
  const barred = series.filter((one) => one.kind === "recorded" || one === owned.at(-1));
  const found = series.flatMap((one) => one.points.map((point) => point.workers));
  const counts = [...new Set(found.length ? found : model.get("measure_workers"))].sort((a, b) => a - b);
  return {
    groups, group, modes, mode, series, barred, counts, live, beside,
    judge: owned.at(-1) ?? series[0] ?? null,
    chosen: nearest(counts, model.get("workers")),
    prediction: model.get("prediction")[mode] ?? {},
    revealed: model.get("revealed"),
    predictable: counts.filter((n) => n > 1),
  };
}
