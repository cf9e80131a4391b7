// From the synced state to what is to be drawn: one pure function of the model. Times are in units of a forward.
import { say } from "./pipelines_words.js";

const CELL = /^(\d+)([A-Z]+)(\d*)$/;

/** A cell's text, "3W0", as stage, kind and microbatch. */
function parse(cell) {
  const [, stage, kind, mb] = CELL.exec(cell);
  return { cell, stage: Number(stage), kind, mb };
}

// Small letters for the second stage of a rank, as in the tables of the schedules.
function labelled(passes) {
  const stages = [...new Set(passes.map((pass) => pass.stage))].sort((a, b) => a - b);
  for (const pass of passes) {
    pass.chunk = stages.indexOf(pass.stage);
    pass.label = (pass.chunk ? pass.kind.toLowerCase() : pass.kind) + pass.mb;
  }
}

/** The passes of all ranks, numbered through, with when they begin and end and which message they are the first to read. */
function passesOf(film, units) {
  const all = [];
  for (const [rank, row] of film.rows.entries()) {
    const mine = row.split(" ").map((cell, i) => {
      const pass = { ...parse(cell), rank, begin: film.begin[rank][i] * film.unit };
      return { ...pass, end: pass.begin + units[pass.kind] * film.unit };
    });
    mine.forEach((pass, i) => { pass.id = all.length + i; pass.before = mine[i - 1] ?? null; pass.after = mine[i + 1] ?? null; });
    labelled(mine);
    all.push(...mine);
  }
  for (const pass of all) {
    const number = film.needs[pass.rank][pass.id - all.find((one) => one.rank === pass.rank).id];
    pass.need = number < 0 ? null : all[number];
    const free = pass.before?.end ?? 0;
    pass.gap = pass.begin - free;
    pass.blocked = pass.gap > 0 && pass.need !== null;
  }
  return all;
}

const dateOf = (machine) => (machine.date ?? "").slice(0, 10).replaceAll("-", "\u2011");

// The reader's latest run of the plan, or else a recorded one.
function measuredOf(model, film) {
  const tagged = [...model.get("own").map((run) => ({ run, key: "yours" })).reverse(),
    ...model.get("recorded").map((run) => ({ run, key: "recordedOn" }))];
  for (const { run, key } of tagged) {
    const point = run.points.find((one) => one.plan === film.plan);
    if (point) {
      const unit = point.unit_s / Math.max(1, film.unit); // the naive split's pass is of the whole batch
      const step = point.step_s.median;
      const shares = Object.fromEntries(Object.entries(point.parts).map(([name, value]) => [name, value / step]));
      const name = say(key, { machine: run.machine.name, date: dateOf(run.machine) });
      const events = point.timeline.map(([rank, cell, begin, end, cpu]) => ({ ...parse(cell), rank,
        begin: begin / 1e6 / unit, end: end / 1e6 / unit, cpu: cpu < 0 ? null : cpu / 1e6 / unit }));
      for (let rank = 0; rank < film.rows.length; rank += 1) labelled(events.filter((event) => event.rank === rank));
      return { run, point, unit, shares, name, events, period: step / unit,
        bubble: shares.exposed_communication + shares.idle };
    }
  }
  return null;
}

// Of which ranks and microbatches there is a measurement of the schedule: [[2, [4, 8]], [4, [8]]].
function measuredSizes(model, films) {
  const plans = new Set([...model.get("own"), ...model.get("recorded")].flatMap((run) => run.points.map((one) => one.plan)));
  const found = new Map();
  for (const { p, m, plan } of films) if (plans.has(plan)) found.set(p, [...(found.get(p) ?? []), m]);
  return [...found];
}

function costs(film) {
  const work = 3 * film.m;
  return { work, bubble: film.period - work, share: (film.period - work) / film.period };
}

/** Everything that the panels need, read from the model at one moment. */
export function viewOf(model) {
  const films = model.get("films");
  const [name, p, m] = [model.get("schedule"), model.get("workers"), model.get("microbatches")];
  const key = `${name}/${p}/${m}`;
  const isOpen = (one) => model.get("skipped") || model.get("shown").includes(`${one.name}/${one.p}/${one.m}`);
  const beside = films.filter((one) => one.p === p && one.m === m);
  const film = beside.find((one) => one.name === name);
  const values = (of) => [...new Set(films.map((one) => one[of]))].sort((a, b) => a - b);
  return { name, p, m, key, film, ...costs(film), names: beside.map((one) => one.name), workers: values("p"),
    microbatches: values("m"), open: isOpen(film), passes: passesOf(film, model.get("units")),
    measured: measuredOf(model, film), sizes: measuredSizes(model, films.filter((one) => one.name === name)), guess: model.get("prediction")[key] ?? {}, ahead: model.get("ahead"),
    beside: beside.map((one) => ({ name: one.name, open: isOpen(one), period: one.period, ...costs(one),
      peak: Math.max(...one.peak), messages: one.messages,
      measured: measuredOf(model, one) })) };
}
