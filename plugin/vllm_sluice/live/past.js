// What the server said, and what follows from it. `points` has one list per column, all as long as `points.times`.

import { clock, duration, last } from "./dom.js";
import { HEADROOM } from "./metrics.js";

const none = () => ({ times: [] });

export class Past {
  points = none();
  switches = [];
  answer = null; // the last one
  engine = null;
  skew = 0; // browser clock minus server clock
  step = 1; // one in so many points is asked for
  spacing = 0; // points are at most so many seconds apart, unless one was missed
  lost = null; // since when and why there is no answer: { since, why }

  // The time after which the server is asked for more; null: from the beginning.
  get since() {
    return last(this.points.times) ?? null;
  }

  get now() {
    return Date.now() / 1000 - this.skew;
  }

  // Takes an answer; `anew` starts over, else it goes on where the last one ended.
  accept(answer, wanted, span, anew) {
    const before = this.engine;
    this.lost = null;
    this.answer = answer;
    this.skew = Date.now() / 1000 - answer.time;
    this.engine = answer.engines.find((e) => e.engine === wanted) ?? answer.engines[0] ?? null;
    const same = this.engine && before?.engine === this.engine.engine && `${this.engine.layers}`.startsWith(before.layers);
    if (anew || !same || this.since > answer.time) [this.points, this.switches, this.spacing] = [none(), [], 0];
    if (!this.engine) return;
    this.spacing = Math.max(this.spacing, answer.spacing_seconds);
    this.engine.order = this.engine.layers.map((_, i) => i).sort((a, b) => this.engine.layers[a] - this.engine.layers[b]);
    if (answer.times.length) this.#append(answer, this.engine);
    this.switches.push(...this.engine.switches);
    this.#forget(answer.time - span);
  }

  #append(answer, engine) {
    const columns = { times: answer.times, ...engine.rows };
    for (const [metric, labels] of Object.entries(engine.series)) {
      for (const [label, values] of Object.entries(labels)) columns[`${metric}/${label}`] = values;
    }
    // A last point that is off the grid of the thinned ones makes room for its successor.
    if (this.provisional) for (const column of Object.values(this.points)) column.pop();
    this.provisional = answer.provisional;
    const known = this.points.times.length;
    for (const key of new Set([...Object.keys(this.points), ...Object.keys(columns)])) {
      this.points[key] ??= Array(known).fill(null);
      this.points[key].push(...(columns[key] ?? answer.times.map(() => null)));
    }
  }

  #forget(before) {
    const old = this.points.times.filter((t) => t < before).length;
    for (const column of Object.values(this.points)) column.splice(0, old);
    this.switches = this.switches.filter(([time]) => time >= before);
  }

  row(metric, at) {
    return this.points[metric]?.[at] ?? [];
  }

  latest(metric) {
    return this.engine?.latest[metric] ?? [];
  }

  baseline(metric) {
    return this.engine?.baseline[`baseline_${metric}`] ?? [];
  }

  value(metric, label = "all") {
    return last(this.points[`${metric}/${label}`]);
  }

  labels(metric) {
    const start = `${metric}/`;
    return Object.keys(this.points).filter((k) => k.startsWith(start) && this.points[k].some((v) => v != null)).map((k) => k.slice(start.length));
  }

  // By how much a counter rose in the span shown.
  rise(metric, label = "all") {
    return this.engine?.increase?.series[metric]?.[label] ?? null;
  }

  layer(index) {
    return String(Number(this.engine.layers[index]));
  }

  // Layers with NaN or infinite values.
  get nonfinite() {
    return this.engine.order.filter((i) => this.latest("nonfinite_total")[i] > 0).map((i) => this.layer(i));
  }

  has(metric) {
    return !!this.engine?.kept.some((row) => row === metric || row.startsWith(`${metric}:`));
  }

  // Formats and scales whose headroom is known.
  get variants() {
    return this.engine?.kept.filter((row) => row.startsWith(`${HEADROOM}:`)).map((row) => row.slice(HEADROOM.length + 1)) ?? [];
  }

  get busy() {
    return Object.entries(this.engine?.latest ?? {}).some(([metric, row]) => row.length && !metric.endsWith("_total"));
  }

  // Whether a point has a value of any layer.
  measured(at) {
    return Object.keys(this.engine?.rows ?? {}).some((metric) => this.row(metric, at).length);
  }

  // State in a word, and what makes it so.
  health() {
    if (this.lost) return ["lost", "no answer", `from the server since ${clock(this.lost.since)}`];
    const ranks = this.labels("snapshot_age_seconds");
    const ages = ranks.map((r) => this.value("snapshot_age_seconds", r));
    const silent = ranks.filter((_, i) => ages[i] == null);
    if (silent.length === ranks.length) return ["gone", "no data", "no worker reports"];
    if (silent.length) return ["stale", "stale", `${silent.join(", ")} stopped reporting`];
    const age = Math.max(...ages) + Math.max(0, this.now - last(this.points.times));
    const state = age > this.answer.stale_after_seconds ? "stale" : this.busy ? "live" : "idle";
    return [state, state, `last snapshot ${duration(age)} ago${state === "idle" ? ", no traffic" : ""}`];
  }

  whyEmpty() {
    if (!this.answer) return this.lost ? "The server has not answered yet." : "Waiting for the first answer.";
    if (this.health()[0] === "gone") return "No worker reports. While a model loads this is normal, for minutes if it is large.";
    const seen = this.points.times.filter((_, i) => this.measured(i));
    return `No traffic in the window${seen.length ? `; the last values are from ${clock(last(seen))}` : ""}. Send the model a request and look again.`;
  }

  // Latest values by site of the quantization metrics.
  sites(metric, variant) {
    const start = `${metric}:${variant}:`;
    return Object.entries(this.engine.latest).filter(([key]) => key.startsWith(start)).map(([key, values]) => ({ site: key.slice(start.length).replaceAll("_", " "), values }));
  }

  // The layer and site that suffer most.
  worst(metric, variant) {
    return this.sites(metric, variant).map(({ site, values }) => ({ site, ...this.extreme(values, true) })).filter((w) => w.text).sort((a, b) => a.value - b.value)[0];
  }

  // The highest or lowest of values by layer: { index, value, text }.
  extreme(values, lowest = false) {
    let best = null;
    values.forEach((v, index) => {
      if (v != null && (!best || (lowest ? v < best.value : v > best.value))) best = { index, value: v };
    });
    return best && { ...best, text: `layer ${this.layer(best.index)}` };
  }
}
