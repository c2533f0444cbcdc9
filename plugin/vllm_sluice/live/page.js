const RAMP = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis
const INFINITE = [224, 33, 138];

// Text; null is an absent value

const present = (text) => (v) => (v == null ? "–" : text(v));
const number = present((v) => (Math.abs(v) >= 1e7 ? v.toExponential(2) : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : v.toPrecision(4)));
const exact = present((v) => (Math.abs(v) >= 1e7 ? v.toExponential() : v.toLocaleString("en", { maximumSignificantDigits: 6 })));
const count = present((v) => v.toLocaleString("en"));
const share = present((v) => v.toFixed(3));
const clock = (time, length = 8) => new Date(time * 1000).toTimeString().slice(0, length);
const duration = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`);

// The table's columns; those with a text are the heatmap's too
const COLUMNS = [
  { key: "activation_abs_max", name: "max |h|", log: true, unit: "scale of the hidden state, logarithmic",
    about: "Largest absolute value of the hidden state after each layer. Good: even rows; one that turns brighter is a growing massive activation." },
  { key: "activation_median", name: "median |h|" },
  { key: "activation_max_to_median_ratio", name: "max / median", log: true, unit: "times the median |h|, logarithmic",
    about: "Largest |h| over the median of its layer. Good: even rows; from about 1,000 on it counts as massive and costs INT8 and FP8 their resolution." },
  { key: "activation_kurtosis", name: "kurtosis", log: true },
  { key: "activation_top_channel", name: "top channel", show: present(String) },
  { key: "attention_sink_mass", name: "sink mass", show: share, unit: "share of attention on position 0",
    about: "Attention that sampled queries give to the first token, mean over heads. Good: even rows; 0.3 to 0.8 is usual without a gate, near 0 with one." },
  { key: "attention_sink_heads", name: "sink heads", show: count, of: "attention_heads" },
  { key: "attention_entropy_ratio", name: "entropy", show: share, unit: "entropy / log of the visible keys",
    about: "How evenly attention spreads: 1 is even, 0 is one single token. Good: even rows; a sudden fall to 0 is a collapse." },
  { key: "gate_mean", name: "gate mean", show: share, gate: true, unit: "mean gate value",
    about: "Mean value of the gate: 0 shuts a head off, 1 lets it pass. Good: low but not 0 (published models: 0.1 to 0.2); near 1 the gate does nothing." },
  { key: "gate_closed_ratio", name: "gate closed", show: share, gate: true },
];
const METRICS = COLUMNS.filter((c) => c.about);

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
const last = (list) => list?.[list.length - 1];
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const put = (place, text) => place.textContent !== text && (place.textContent = text);
const finite = (values) => values.filter((v) => v > 0 && Number.isFinite(v));

function make(tag, content = "", attributes = {}, place = {}) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  Object.assign(made.style, place);
  made.append(...[content].flat());
  return made;
}

// What the server said: `points` has one list per column, all as long as `points.times`

let picked = METRICS[0];
let chosen = "0"; // engine
let points = { times: [] };
let skew = 0; // browser clock minus server clock
let turn = 0;
let answer, engine, lost, timer, cursor;

async function poll(reset = false) {
  const mine = ++turn;
  clearTimeout(timer);
  const since = reset || !points.times.length ? -$.span.value : last(points.times);
  const query = new URLSearchParams({ since, points: 720, engine: chosen, metrics: METRICS.map((m) => m.key) });
  const received = await fetch(`live.json?${query}`).then((r) => r.json()).catch(() => null);
  if (mine !== turn) return;
  lost = received?.engines ? null : lost ?? Date.now() / 1000 - skew;
  if (!lost) accept(received, reset);
  render();
  timer = setTimeout(poll, 1000 * Math.max(1, answer?.period_seconds ?? 2));
}

function accept(received, reset) {
  const before = engine;
  answer = received;
  skew = Date.now() / 1000 - answer.time;
  engine = answer.engines.find((e) => e.engine === chosen) || answer.engines[0];
  const goesOn = engine && before?.engine === engine.engine && `${engine.layers}`.startsWith(before.layers);
  if (reset || !goesOn || last(points.times) > answer.time) points = { times: [], cover: [] };
  if (!engine) return;
  chosen = engine.engine;
  engine.order = engine.layers.map((_, i) => i).sort((a, b) => engine.layers[a] - engine.layers[b]);
  const columns = { times: answer.times, cover: answer.times.map(() => answer.step * answer.period_seconds), ...engine.rows };
  for (const [metric, labels] of Object.entries(engine.series)) {
    for (const [label, values] of Object.entries(labels)) columns[`${metric}:${label}`] = values;
  }
  const known = points.times.length;
  const old = points.times.filter((t) => t < answer.time - $.span.value).length;
  for (const key of new Set([...Object.keys(points), ...Object.keys(columns)])) {
    points[key] ??= Array(known).fill(null);
    points[key].push(...(columns[key] || answer.times.map(() => null)));
    points[key].splice(0, old);
  }
}

// What follows from it

const row = (metric, at = points.times.length - 1) => points[metric]?.[at] || [];
const latest = (metric) => engine.latest[metric] || [];
const value = (metric, label = "all") => last(points[`${metric}:${label}`]);
const labels = (metric) => Object.keys(points).filter((k) => k.startsWith(`${metric}:`) && points[k].some((v) => v != null)).map((k) => k.slice(metric.length + 1));
const layer = (index) => String(Number(engine.layers[index]));
const hasValues = (at) => METRICS.some(({ key }) => row(key, at).length);
const hasGate = () => value("patch_installed", "gate") === 1 || !!points.gate_mean?.some((r) => r.length);
const said = (patch, on) => `${patch} ${on ? "on" : "off"}`;
const shown = (columns) => columns.filter((c) => !c.gate || hasGate());

function health() {
  if (lost) return ["lost", "no answer", `from the server since ${clock(lost)}`];
  const ranks = labels("snapshot_age_seconds");
  const silent = ranks.filter((r) => value("snapshot_age_seconds", r) == null);
  if (ranks.length === silent.length) return ["gone", "no data", "no worker reports"];
  if (silent.length) return ["stale", "stale", `${silent.join(", ")} stopped reporting`];
  const age = Math.max(...ranks.map((r) => value("snapshot_age_seconds", r))) + Math.max(0, Date.now() / 1000 - skew - last(points.times));
  const state = age > answer.stale_after_seconds ? "stale" : hasValues() ? "live" : "idle";
  return [state, state, `last snapshot ${duration(age)} ago${state === "idle" ? ", no traffic" : ""}`];
}

function whyEmpty() {
  if (health()[0] === "gone") return "No worker reports. While a model loads this is normal.";
  const seen = points.times.filter((_, i) => hasValues(i));
  return `No traffic in the window${seen[0] ? `; the last values are from ${clock(last(seen))}` : ""}.`;
}

// Shows a box, or in its place why there is nothing to show.
function explain(box, note, reason) {
  box.hidden = !!reason;
  put(note, reason || "");
  return reason;
}

function peakOf(metric) {
  const [index, peak] = Object.entries(latest(metric)).reduce((best, one) => ((one[1] ?? -1) > (best[1] ?? -1) ? one : best), []);
  return index && { index, value: peak, text: `layer ${layer(index)}` };
}

function mean(metric) {
  const values = latest(metric).filter((v) => v != null);
  return values.length ? values.reduce((a, b) => a + b) / values.length : null;
}

// Runs of one state, and the switches between them at the patch's own time stamp, else at the point's time.
function lane(patch) {
  const runs = [];
  const switches = [];
  let stamp = 0;
  points.times.forEach((time, i) => {
    const on = points[`patch_enabled:${patch}`]?.[i];
    if (on == null) return;
    const changed = points[`patch_last_change_timestamp_seconds:${patch}`]?.[i] || 0;
    const run = last(runs);
    const begin = time - points.cover[i];
    if (run && begin - run.to < 1.5 * points.cover[i]) {
      const stamped = changed > Math.max(stamp, run.from);
      if (on !== run.on || stamped) switches.push({ patch, on, time: stamped ? Math.min(changed, time) : time });
      run.to = on === run.on ? time : last(switches).time;
      if (on !== run.on) runs.push({ on, from: run.to, to: time });
    } else runs.push({ on, from: begin, to: time });
    stamp = Math.max(stamp, changed);
  });
  return { patch, runs, switches };
}

// The point that stands for a time, or -1 in a gap.
function pointAt(time) {
  const next = points.times.findIndex((t) => t >= time);
  const before = (next < 0 ? points.times.length : next) - 1;
  return [next, before].find((i) => Math.abs(points.times[i] - time) <= 1.6 * points.cover[i]) ?? -1;
}

function axis() {
  const end = Math.max(answer.time, last(points.times));
  const begin = Math.min(end - 60, Math.max(end - $.span.value, points.times[0] - points.cover[0]));
  return { begin, end, place: (time) => 100 * clamp((time - begin) / (end - begin), 0, 1) };
}

// Header and tiles

function renderHeader() {
  const [state, word, detail] = health();
  $.state.className = state;
  put($.state, word);
  put($.age, detail);
  if (!engine) return;
  put($.model, engine.model_name);
  document.title = `${engine.model_name} · Sluice`;
  const { version, vllm_version, fingerprint } = engine.info;
  put($.versions, `Sluice ${version} · vLLM ${vllm_version} · fingerprint ${fingerprint} · ${engine.layers.length} layers · ranks: ${labels("snapshot_age_seconds").length}`);
  if ($.engine.length !== answer.names.length) $.engine.replaceChildren(...answer.names.map((n) => make("option", n, { value: n })));
  $.engine.value = chosen;
  $.engines.hidden = answer.names.length < 2;
  const failed = labels("probe_errors_total").filter((p) => value("probe_errors_total", p) > 0);
  $.notice.hidden = !failed.length;
  put($.notice, failed.map((p) => `The ${p} probe failed ${count(value("probe_errors_total", p))} times; its numbers may be missing. See the server log.`).join(" "));
}

function tile(title, content, subs, kind = "") {
  const none = content == null;
  return make("div", [
    make("h3", title),
    make("p", none ? (hasValues() ? "not measured" : "no traffic") : content, { class: none ? "words" : `value ${kind}` }),
    ...(none ? ["in the window"] : subs).filter(Boolean).map((s) => make("p", s, { class: "sub" }))], { class: "tile" });
}

function patchTile(patch) {
  const title = `Patch ${patch}`;
  if (!value("patch_installed", patch)) return tile(title, "not installed", ["the model runs as released"], "words");
  const on = value("patch_enabled", patch);
  const change = value("patch_last_change_timestamp_seconds", patch);
  return tile(title, on ? "on" : "off", [change ? `since ${clock(change)}` : "not switched yet"], on ? "good" : "");
}

function renderTiles() {
  if (!engine) return $.tiles.replaceChildren(tile("Snapshots", "no data", [whyEmpty()], "words"));
  const peak = peakOf("activation_abs_max");
  const sink = peakOf("attention_sink_mass");
  const gate = mean("gate_mean");
  const massive = labels("massive_activations_total").map((p) => [value("massive_activations_total", p), p]).filter(([n]) => n > 0);
  const bad = engine.order.filter((i) => latest("nonfinite_total")[i] > 0).map(layer);
  const patches = labels("patch_installed");
  $.tiles.replaceChildren(
    ...(patches[0] ? patches : ["gate"]).map(patchTile),
    tile("Strongest sink", sink && share(sink.value), sink && [
      `${sink.text} · ${count(latest("attention_sink_heads")[sink.index])} of ${count(latest("attention_heads")[sink.index])} heads`]),
    tile("Largest |h|", peak && number(peak.value), peak && [
      `${peak.text} · ${number(latest("activation_max_to_median_ratio")[peak.index])} × median`,
      massive[0] && `massive: ${massive.map(([n, position]) => `${count(n)} ${position}`).join(", ")}`], peak?.value === Infinity ? "bad" : ""),
    hasGate() ? tile("Mean gate", gate && share(gate), ["mean over layers", `${share(mean("gate_closed_ratio"))} of gates closed`])
      : tile("Mean gate", "no gate", ["nothing to measure"], "words"),
    tile("Non-finite", count(value("nonfinite_total")), [
      bad[0] ? `in layer ${bad.slice(0, 4).join(", ")}${bad[4] ? ", …" : ""}` : "since the start"], bad[0] ? "bad" : ""),
    tile("Tokens seen", ["prefill", "decode"].map((p) => make("span", [count(value("tokens_observed_total", p)), make("small", ` ${p}`)])), []));
}

// Heatmap

// Snapped to quarters of a decade, so that colours hold still between two refreshes.
function range() {
  if (!picked.log) return [0, 1];
  let [low, high] = [Infinity, 0];
  for (const r of points[picked.key]) for (const v of finite(r)) [low, high] = [Math.min(low, v), Math.max(high, v)];
  return high ? [10 ** (Math.floor(4 * Math.log10(low)) / 4), 10 ** (Math.floor(4 * Math.log10(high) + 1) / 4)] : [1, 10];
}

function colour(v, [low, high]) {
  if (!Number.isFinite(v)) return INFINITE;
  const part = picked.log ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low);
  const at = clamp(part, 0, 1) * (RAMP.length - 1);
  const stop = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[stop].map((c, i) => c + (at - stop) * (RAMP[stop + 1][i] - c));
}

function renderHeat(switches) {
  const metrics = shown(METRICS);
  if (!metrics.includes(picked)) picked = METRICS[0];
  for (const input of $.metrics.querySelectorAll("input")) {
    input.checked = input.value === picked.key;
    input.parentNode.hidden = !metrics.some((m) => m.key === input.value);
  }
  put($.about, picked.about);
  if (explain($.heatBox, $.heatEmpty, !points.times.some((_, i) => hasValues(i)) && whyEmpty())) return;
  const { begin, end, place } = axis();
  const scale = range();
  const height = engine.order.length;
  const width = Math.max(1, $.plot.clientWidth);
  const cell = clamp(Math.floor(416 / height), 4, 28);
  const image = new ImageData(width, height);
  for (let x = 0; x < width; x++) {
    const values = row(picked.key, pointAt(begin + ((x + 0.5) / width) * (end - begin)));
    engine.order.forEach((index, y) => {
      if (values[index] != null) image.data.set([...colour(values[index], scale), 255], 4 * (y * width + x));
    });
  }
  Object.assign($.heat, { width, height }).getContext("2d").putImageData(image, 0, 0);
  $.heat.style.height = `${cell * height}px`;
  const peak = peakOf(picked.key);
  $.heat.ariaLabel = `Heatmap of ${picked.name}: ${height} layers from ${clock(begin)} to ${clock(end)}; ${
    peak ? `highest now ${exact(peak.value)} in ${peak.text}; all layers in the table below` : "no value now"}`;
  const every = [1, 2, 4, 8, 16].find((n) => n * cell >= 14);
  $.layers.replaceChildren(...engine.order.map(layer).flatMap((name, y) => (y % every ? [] : [make("span", name, {}, { top: `${(100 * (y + 0.5)) / height}%` })])));
  let free = -Infinity;
  $.marks.replaceChildren(...switches.flatMap(({ patch, on, time }) => {
    const left = `${place(time)}%`;
    const at = (place(time) / 100) * width;
    const line = make("i", "", {}, { left });
    if (at < free) return [line];
    free = at + 64;
    return [line, make("b", said(patch, on), {}, { left, transform: `translateX(${at < 40 ? 0 : at > width - 40 ? -100 : -50}%)` })];
  }));
  renderAxis($.heatAxis);
  $.ramp.style.background = `linear-gradient(90deg, ${RAMP.map((c) => `rgb(${c})`)})`;
  const middle = picked.log ? Math.sqrt(scale[0] * scale[1]) : 0.5;
  $.ticks.replaceChildren(...[scale[0], middle, scale[1]].map((v) => make("span", exact(+v.toPrecision(2)))));
  put($.unit, picked.unit);
  $.switchKey.hidden = !switches[0];
  renderTip();
}

function renderAxis(box) {
  const { begin, end, place } = axis();
  const every = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800].find((n) => n >= ((end - begin) * 90) / Math.max(1, $.plot.clientWidth)) || 3600;
  const times = [];
  for (let t = begin + every - (begin % every); t <= end; t += every) times.push(make("span", clock(t, every < 60 ? 8 : 5), {}, { left: `${place(t)}%` }));
  box.replaceChildren(...times);
}

function renderTip() {
  const at = cursor ? pointAt(cursor.time) : -1;
  const index = engine?.order[cursor?.y];
  $.tip.hidden = $.cursor.hidden = at < 0 || index == null;
  if ($.tip.hidden) return;
  $.tip.replaceChildren(make("b", `layer ${layer(index)} · ${clock(points.times[at])}`), ...shown(METRICS).map((m) =>
    make("p", [make("span", m.name), make("span", exact(row(m.key, at)[index]))], m === picked ? { class: "picked" } : {})));
  const left = (axis().place(cursor.time) / 100) * $.plot.clientWidth;
  const cell = $.heat.clientHeight / engine.order.length;
  const right = left + 14 + $.tip.offsetWidth > $.plot.clientWidth;
  Object.assign($.cursor.style, { left: `${left}px`, top: `${cursor.y * cell}px`, height: `${cell}px` });
  Object.assign($.tip.style, { left: `${Math.max(0, right ? left - 14 - $.tip.offsetWidth : left + 14)}px`,
    top: `${clamp(cursor.y * cell, 0, Math.max(0, $.heat.clientHeight - $.tip.offsetHeight))}px` });
}

function setCursor(cell) {
  cursor = cell;
  renderTip();
}

function onPointer({ offsetX, offsetY }) {
  const { begin, end } = axis();
  setCursor({ y: Math.floor((offsetY / $.heat.clientHeight) * engine.order.length), time: begin + (offsetX / $.heat.clientWidth) * (end - begin) });
}

function onKey(event) {
  if (event.key === "Escape") setCursor(null);
  const move = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (!move) return;
  event.preventDefault();
  const end = points.times.length - 1;
  const at = cursor ? clamp(pointAt(cursor.time) + move[0], 0, end) : end;
  setCursor({ y: cursor ? clamp(cursor.y + move[1], 0, engine.order.length - 1) : 0, time: points.times[at] });
}

// Table

function bar(column, v, values) {
  if (!column.log) return column.show === share || column.of ? clamp(v, 0, 1) : 0;
  const low = Math.min(...finite(values)) / 2;
  return v > 0 ? Math.min(1, Math.log(v / low) / Math.log(Math.max(...finite(values)) / low)) : 0;
}

function renderTable() {
  if (explain($.tableBox, $.tableEmpty, !hasValues() && whyEmpty())) return;
  const columns = shown(COLUMNS);
  $.head.replaceChildren(make("tr", ["layer", ...columns.map((c) => c.name)].map((n) => make("th", n, { scope: "col" }))));
  $.body.replaceChildren(...engine.order.map((index) => {
    const bad = latest("nonfinite_total")[index];
    const cells = columns.map((c) => {
      const v = latest(c.key)[index];
      const whole = c.of && latest(c.of)[index];
      const width = `${92 * bar(c, whole ? v / whole : v, latest(c.key))}%`;
      const text = (c.show || number)(v);
      return make("td", [make("i", "", {}, { width }), make("span", whole ? `${text} / ${whole}` : text)]);
    });
    return make("tr", [make("th", [layer(index), bad > 0 ? make("div", `${count(bad)} NaN/∞`, { class: "bad fine" }) : ""], { scope: "row" }), ...cells]);
  }));
}

// Patch lanes

function renderLanes(lanes, switches) {
  if (explain($.laneBox, $.laneEmpty, !lanes.length && (engine ? "No patch is installed: the model runs as released." : whyEmpty()))) return;
  const { end, place } = axis();
  $.lanes.replaceChildren(...lanes.flatMap(({ patch, runs }) => [make("h3", patch), make("div", runs.map((run) => {
    const to = end - run.to < 3 * answer.period_seconds ? end : run.to;
    return make("div", run.on ? "on" : "off", { class: run.on ? "run on" : "run" }, { left: `${place(run.from)}%`, width: `${place(to) - place(run.from)}%` });
  }), { class: "plot" })]));
  renderAxis($.laneAxis);
  const list = switches.slice(-12).reverse().map((s) => make("li", `${clock(s.time)} ${said(s.patch, s.on)}`));
  $.switches.replaceChildren(...(list[0] ? list : ["No switch in this span."]));
}

function render() {
  const lanes = labels("patch_enabled").filter((p) => value("patch_installed", p) !== 0).map(lane);
  const switches = lanes.flatMap((l) => l.switches).sort((a, b) => a.time - b.time);
  renderHeader();
  renderTiles();
  renderHeat(switches);
  renderTable();
  renderLanes(lanes, switches);
}

for (const metric of METRICS) {
  const input = make("input", "", { type: "radio", name: "metric", value: metric.key });
  input.onchange = () => { picked = metric; render(); };
  $.metrics.append(make("label", [input, make("span", metric.name)]));
}
$.engine.onchange = () => { chosen = $.engine.value; poll(true); };
$.span.onchange = () => poll(true);
$.heat.onpointermove = $.heat.onpointerdown = onPointer;
$.heat.onpointerleave = $.heat.onblur = () => setCursor(null);
$.heat.onkeydown = onKey;
onresize = render;
document.onvisibilitychange = () => (document.hidden ? clearTimeout(timer) : poll());
setInterval(renderHeader, 1000);
poll(true);
