// The time axis that the maps and the lanes share, and the lanes: when each patch was installed and enabled.

import { $, clamp, clock, fill, last, make, put } from "./dom.js";

export const said = (patch, on) => `${patch} ${on ? "on" : "off"}`;

export function axisOf(past, span) {
  const { times } = past.points;
  const end = Math.max(past.answer.time, last(times));
  const begin = Math.min(end - 60, Math.max(end - span, times[0] - past.spacing));
  return { begin, end, place: (time) => 100 * clamp((time - begin) / (end - begin), 0, 1) };
}

// For each pixel column the point that stands for its time, or -1 in a gap.
export function pointsAcross(past, { begin, end }, width) {
  const { times } = past.points;
  const reach = 1.6 * Math.max(past.spacing, past.answer.period_seconds);
  let next = 0;
  return Array.from({ length: width }, (_, x) => {
    const time = begin + ((x + 0.5) / width) * (end - begin);
    while (next < times.length && times[next] < time) next++;
    return [next, next - 1].find((i) => Math.abs(times[i] - time) <= reach) ?? -1;
  });
}

export const pointAt = (past, time) => pointsAcross(past, { begin: time, end: time }, 1)[0];

// Stretches of one state. Switches come with their own times and are all there, even those between two points.
function runsOf(past, patch) {
  const seen = [
    ...past.points.times.map((time, i) => ({ time, on: past.points[`patch_enabled/${patch}`][i] })),
    ...past.switches.filter(([, p]) => p === patch).map(([time, , on, generation]) => ({ time, on: +on, generation })),
  ].filter(({ on }) => on != null).sort((a, b) => a.time - b.time);
  const runs = [];
  for (const { time, on, generation = null } of seen) {
    const run = last(runs);
    if (!run || time - run.to > 2.6 * past.spacing) runs.push({ on, generation, from: time - past.spacing, to: time });
    else {
      run.to = time;
      if (on !== run.on) runs.push({ on, generation, from: time, to: time });
    }
  }
  return runs;
}

export function lanesOf(past) {
  return past.labels("patch_enabled").filter((p) => past.value("patch_installed", p) !== 0).map((patch) => ({ patch, runs: runsOf(past, patch) }));
}

// What the patches did at a time, in words.
export function actingAt(lanes, time) {
  return lanes.flatMap(({ patch, runs }) => {
    const run = runs.findLast((r) => r.from <= time);
    return run ? said(patch, run.on) : [];
  });
}

function renderAxis(box, { begin, end, place }, width) {
  const every = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600].find((n) => n >= ((end - begin) * 90) / width) ?? 7200;
  const times = [];
  // Full hours of the reader, not of UTC.
  const shift = 60 * new Date(end * 1000).getTimezoneOffset();
  for (let t = begin + every - ((begin - shift) % every); t <= end; t += every) if (place(t) * width > 1600) times.push(make("span", clock(t, every < 60 ? 8 : 5), {}, { left: `${place(t)}%` }));
  fill(box, times);
}

// Words above the picture for the switches that have room; every one has its line.
export function renderMarks(box, switches, { place }, width, words) {
  let free = words ? -Infinity : Infinity;
  fill(box, switches.flatMap(([time, patch, on]) => {
    const left = `${place(time)}%`;
    const at = (place(time) / 100) * width;
    const line = make("i", "", {}, { left });
    if (at < free) return [line];
    free = at + 64;
    return [line, make("b", said(patch, on), {}, { left, transform: `translateX(${at < 40 ? 0 : at > width - 40 ? -100 : -50}%)` })];
  }));
}

export function renderLanes(past, lanes, axis) {
  put($.laneEmpty, axis && !lanes.length ? "No patch is installed: the model runs as released." : "");
  $.laneBox.hidden = !axis;
  if (!axis) return;
  const { end, place } = axis;
  const width = Math.max(1, $.axis.clientWidth);
  fill($.lanes, lanes.flatMap(({ patch, runs }) => [make("h3", `patch ${patch}`), make("div", runs.map((run) => {
    const to = end - run.to < 3 * past.spacing ? end : run.to;
    const part = place(to) - place(run.from);
    const generation = run.generation == null ? "" : ` · generation ${run.generation}`;
    const spoken = `${said(patch, run.on)}${generation}, ${clock(run.from)} to ${clock(to)}`;
    const room = (part / 100) * width;
    const word = room < 30 ? "" : (run.on ? "on" : "off") + (room < 130 ? "" : generation);
    return make("div", [make("span", word, { "aria-hidden": "true" }), make("span", spoken, { class: "hidden" })], { class: run.on ? "run on" : "run", title: spoken },
      { left: `${place(run.from)}%`, width: `${part}%` });
  }), { class: "plot" })]));
  renderAxis($.axis, axis, width);
  const list = past.switches.slice(-12).reverse().map(([time, patch, on, generation]) =>
    make("li", `${clock(time)} ${said(patch, on)}${generation == null ? "" : `, generation ${generation}`}`));
  fill($.switches, list.length || !lanes.length ? list : [make("li", "No change in this span.")]);
}
