const RAMP = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const INFINITE = [224, 33, 138];
const MARGIN = { left: 34, right: 2, top: 16, bottom: 20 };
const POINTS = 720;

const METRICS = [
  { key: "activation_abs_max", name: "max |h|", unit: "scale of the hidden state, logarithmic", log: true,
    text: "Largest absolute value of the hidden state after each layer. Good: even rows; a row that turns brighter is a growing massive activation." },
  { key: "activation_max_to_median_ratio", name: "max / median", unit: "times the median |h|, logarithmic", log: true,
    text: "How far the largest value stands above the median of its layer. Good: even rows; from about 1,000 on it counts as massive and costs INT8 and FP8 their resolution." },
  { key: "attention_sink_mass", name: "sink mass", unit: "share of attention on position 0",
    text: "Share of attention that sampled queries give to the first token, mean over heads. Good: even rows; 0.3 to 0.8 is usual without a gate, a working gate brings it near 0." },
  { key: "gate_mean", name: "gate mean", unit: "mean gate value",
    text: "Mean value of the gate: 0 shuts an attention head off, 1 lets it pass. Good: low but not 0 (published models: 0.1 to 0.2); a row at 1 means that the gate does nothing." },
  { key: "attention_entropy_ratio", name: "entropy", unit: "attention entropy / log of visible keys",
    text: "How evenly attention spreads: 1 is even, 0 is a single token. Good: even rows; a sudden fall to 0 is a collapse." },
];

const number = (v) => {
  if (v == null) return "–";
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size >= 1e7 || (size < 1e-3 && size > 0)) return v.toExponential(2);
  return size >= 1000 ? Math.round(v).toLocaleString("en-US") : String(+v.toPrecision(4));
};
const exact = (v) => (v == null ? "no value" : !Number.isFinite(v) || (v && Math.abs(v) < 1e-3) ? number(v)
  : v.toLocaleString("en-US", { maximumSignificantDigits: 6 }));
const share = (v) => (v == null ? "–" : v.toFixed(3));
const percent = (v) => (v == null ? "–" : `${+(100 * v).toPrecision(3)} %`);
const count = (v) => (v == null ? "–" : v < 1e8 ? v.toLocaleString("en-US") : v.toExponential(3));
const clock = (t, seconds = true) => new Date(t * 1000).toLocaleTimeString("en-GB",
  { hour: "2-digit", minute: "2-digit", ...(seconds && { second: "2-digit" }) });
const duration = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 120 ? `${Math.round(s)} s`
  : s < 7200 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`);
const layerName = (label) => String(Number(label));
const last = (list) => (list && list.length ? list[list.length - 1] : null);
const byId = (id) => document.getElementById(id);
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function element(tag, content = "", attributes = {}) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat());
  return made;
}

function colour(fraction) {
  const at = clamp(fraction, 0, 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (at - low) * (RAMP[low + 1][i] - c)));
}

// ---- what the server said ------------------------------------------------------------------------------------------

const view = { metric: METRICS[0], span: 900, engine: "0", cursor: null };
let doc = null; // last answer, without its points
let data = null; // points of the chosen engine: times, cover (seconds each stands for), rows, series, layers, order
let skew = 0; // browser clock minus server clock
let lostSince = null;
let turn = 0;
let timer = 0;

const serverNow = () => Date.now() / 1000 - skew;

async function poll(reset = false) {
  const mine = ++turn;
  clearTimeout(timer);
  const since = reset || !data || !data.times.length ? -view.span : last(data.times);
  try {
    const answer = await fetch(`live.json?${new URLSearchParams({ since, points: POINTS, engine: view.engine })}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const received = await answer.json();
    if (mine !== turn) return;
    lostSince = null;
    accept(received, reset);
  } catch (error) {
    if (mine !== turn) return;
    lostSince ??= serverNow();
  }
  render();
  timer = setTimeout(poll, 1000 * Math.max(1, doc ? doc.period_seconds : 2));
}

function accept(received, reset) {
  const engine = received.engines.find((e) => e.engine === view.engine) || received.engines[0];
  skew = Date.now() / 1000 - received.time;
  doc = received;
  if (!engine) { data = null; return; }
  const sameLayers = data && data.engine === engine.engine && data.layers.every((l, i) => l === engine.layers[i]);
  if (reset || !sameLayers || last(data.times) > received.time) data = { times: [], cover: [], rows: {}, series: {} };
  view.engine = engine.engine;
  const before = data.times.length;
  const total = before + received.times.length;
  Object.assign(data, { engine: engine.engine, layers: engine.layers, latest: engine.latest, info: engine.info, model: engine.model_name });
  data.order = engine.layers.map((_, i) => i).sort((a, b) => engine.layers[a] - engine.layers[b]);
  data.times.push(...received.times);
  while (data.cover.length < total) data.cover.push(received.step * received.period_seconds);
  for (const [metric, rows] of Object.entries(engine.rows)) (data.rows[metric] ??= []).push(...rows);
  for (const [metric, labels] of Object.entries(engine.series)) {
    for (const [label, values] of Object.entries(labels)) {
      ((data.series[metric] ??= {})[label] ??= Array(before).fill(null)).push(...values);
    }
  }
  for (const labels of Object.values(data.series)) {
    for (const values of Object.values(labels)) while (values.length < total) values.push(null);
  }
  const old = data.times.findIndex((t) => t >= received.time - view.span);
  if (old > 0) {
    const lists = [data.times, data.cover, ...Object.values(data.rows), ...Object.values(data.series).flatMap(Object.values)];
    for (const list of lists) list.splice(0, old);
  }
}

// ---- what follows from it ------------------------------------------------------------------------------------------

const current = (metric) => last(data.rows[metric]) || [];
const series = (metric) => data.series[metric] || {};
const counted = (metric, label) => last(series(metric)[label]);
const hasTraffic = () => ["activation_abs_max", "attention_sink_mass", "gate_mean"].some((m) => current(m).length);
const knowsGate = () => (data.rows.gate_mean || []).some((row) => row.length) || counted("patch_installed", "gate") === 1;

function health() {
  if (lostSince != null) return ["lost", "no answer", `from the server since ${clock(lostSince)}`];
  if (!data || !data.times.length) return ["none", "no data", "no worker has written a snapshot yet"];
  const ages = Object.entries(series("snapshot_age_seconds")).map(([rank, values]) => [rank, last(values)]);
  const reporting = ages.filter(([, age]) => age != null);
  if (!reporting.length) return ["none", "no data", ages.length ? "the workers are gone" : "no worker has written a snapshot yet"];
  const age = Math.max(...reporting.map(([, a]) => a)) + Math.max(0, serverNow() - last(data.times));
  const ago = `last snapshot ${duration(age)} ago`;
  if (age > doc.stale_after_seconds) return ["stale", "stale", ago];
  if (reporting.length < ages.length) {
    return ["stale", "stale", `${ages.filter(([, a]) => a == null).map(([rank]) => rank).join(", ")} stopped reporting`];
  }
  return hasTraffic() ? ["live", "live", ago] : ["idle", "idle", ago];
}

function top(metric) {
  const values = current(metric);
  let best = -1;
  values.forEach((v, i) => { if (v != null && (best < 0 || v > values[best])) best = i; });
  return best < 0 ? null : { index: best, value: values[best], layer: layerName(data.layers[best]) };
}

function mean(metric) {
  const values = current(metric).filter((v) => v != null);
  return values.length ? values.reduce((a, b) => a + b) / values.length : null;
}

function lastSeen() {
  for (let i = data.times.length - 1; i >= 0; i--) {
    if (METRICS.some(({ key }) => data.rows[key][i].length)) return data.times[i];
  }
  return null;
}

function whyEmpty() {
  if (!data || health()[0] === "none") return "No data: no worker is reporting. While a model loads this is normal.";
  const seen = lastSeen();
  return `No traffic in the window${seen ? `; the last values are from ${clock(seen)}` : ""}. Send a request and the numbers appear.`;
}

// Switches and the spans between them: the patch's own time stamp where there is one, else the time of the point.
function patchHistory(patch) {
  const enabled = series("patch_enabled")[patch] || [];
  const changed = series("patch_last_change_timestamp_seconds")[patch] || [];
  const installed = series("patch_installed")[patch] || [];
  const runs = [];
  const switches = [];
  let stamp = null;
  data.times.forEach((time, i) => {
    const on = installed[i] === 0 ? null : enabled[i];
    const run = last(runs);
    const joined = run && time - run.to <= 2.5 * data.cover[i];
    const isNew = changed[i] != null && changed[i] !== stamp && (stamp != null || changed[i] > time - data.cover[i] - 1);
    const isSwitch = joined && on != null && run.on != null && (isNew || on !== run.on);
    const at = isNew && isSwitch ? clamp(changed[i], run.from, time) : time;
    if (isSwitch) switches.push({ time: at, patch, on });
    if (changed[i] != null) stamp = changed[i];
    if (!joined) runs.push({ from: time - data.cover[i], to: time, on });
    else if (run.on === on) run.to = time;
    else { run.to = at; runs.push({ from: at, to: time, on }); }
  });
  return { patch, runs: runs.filter((r) => r.on != null), switches };
}

const patches = () => Object.keys(series("patch_installed"))
  .filter((p) => series("patch_installed")[p].some((v) => v === 1)).map(patchHistory);

// ---- header and tiles ----------------------------------------------------------------------------------------------

function renderHeader() {
  const [state, word, detail] = health();
  byId("state").dataset.state = state;
  byId("state").textContent = word;
  byId("age").textContent = state === "idle" ? `${detail}, no traffic` : detail;
  if (!data) return;
  byId("model").textContent = data.model;
  document.title = `${data.model} · Sluice`;
  const ranks = Object.keys(series("snapshot_age_seconds")).length;
  byId("versions").textContent = [
    `Sluice ${data.info.version}`, `vLLM ${data.info.vllm_version}`, `fingerprint ${data.info.fingerprint}`,
    `${data.layers.length} layers`, ranks === 1 ? "1 rank" : `${ranks} ranks`].join(" · ");
  const picker = byId("engine");
  if (picker.options.length !== doc.names.length) picker.replaceChildren(...doc.names.map((n) => element("option", n, { value: n })));
  picker.value = view.engine;
  byId("engine-picker").hidden = doc.names.length < 2;
  const failed = Object.entries(series("probe_errors_total")).filter(([, v]) => last(v) > 0);
  byId("notice").hidden = !failed.length;
  const text = failed.map(([probe, v]) => `The ${probe} probe failed ${count(last(v))} times; its numbers may be missing or old. The server log says why.`).join(" ");
  if (byId("notice").textContent !== text) byId("notice").textContent = text;
}

function tile(id, title, value, subs, kind = "") {
  return element("div", [element("h3", title), element("p", value, { class: `value ${kind}` }),
    ...subs.filter(Boolean).map((s) => element("p", s, { class: "sub" }))], { class: "tile", "data-tile": id });
}

function patchTile(patch) {
  const installed = counted("patch_installed", patch);
  const enabled = counted("patch_enabled", patch);
  const change = counted("patch_last_change_timestamp_seconds", patch);
  if (installed == null && health()[0] === "none") return tile("patch", `Patch ${patch}`, "unknown", [], "words");
  if (!installed) return tile("patch", `Patch ${patch}`, "not installed", ["the model runs as released"], "words");
  return tile("patch", `Patch ${patch}`, enabled ? "on" : "off",
    [change ? `switched ${enabled ? "on" : "off"} at ${clock(change)}` : "not switched since the start"], enabled ? "good" : "");
}

function tokensPerSecond() {
  const phases = Object.values(series("tokens_observed_total"));
  const end = data.times.length - 1;
  const start = data.times.findIndex((t) => t >= data.times[end] - 30);
  const seconds = data.times[end] - data.times[start];
  if (!(seconds > 0) || phases.some((p) => p[start] == null || p[end] == null)) return "";
  const tokens = phases.reduce((sum, p) => sum + p[end] - p[start], 0);
  return tokens < 0 ? "" : `${number(+(tokens / seconds).toPrecision(3))} tokens/s over ${duration(seconds)}`;
}

function renderTiles() {
  if (!data) { byId("tiles").replaceChildren(tile("none", "Snapshots", "no data", [whyEmpty()], "words")); return; }
  const quiet = hasTraffic() ? "not measured" : "no traffic";
  const window = "in the window";
  const peak = top("activation_abs_max");
  const sink = top("attention_sink_mass");
  const gate = mean("gate_mean");
  const nonfinite = counted("nonfinite_total", "all");
  const massive = series("massive_activations_total");
  const massiveText = Object.keys(massive).map((p) => `${count(last(massive[p]))} ${p}`).join(", ");
  const bad = (data.latest.nonfinite_total || []).map((v, i) => [v, data.layers[i]]).filter(([v]) => v > 0).map(([, l]) => Number(l));
  const installed = Object.keys(series("patch_installed"));
  const tokens = ["prefill", "decode"].map((phase) => element("span", [count(counted("tokens_observed_total", phase)), " ", element("small", phase)]));
  byId("tiles").replaceChildren(
    ...(installed.length ? installed : ["gate"]).map(patchTile),
    sink ? tile("sink", "Strongest sink", share(sink.value), [`layer ${sink.layer}`,
      current("attention_heads")[sink.index] != null && `${number(current("attention_sink_heads")[sink.index])} of ${number(current("attention_heads")[sink.index])} heads are sinks`])
      : tile("sink", "Strongest sink", quiet, [window], "words"),
    peak ? tile("peak", "Largest |h|", number(peak.value), [
      `layer ${peak.layer} · ${number(current("activation_max_to_median_ratio")[peak.index])} × median`,
      massiveText && `massive: ${massiveText}`], Number.isFinite(peak.value) ? "" : "bad")
      : tile("peak", "Largest |h|", quiet, [window, massiveText && `massive: ${massiveText}`], "words"),
    gate != null ? tile("gate", "Mean gate", share(gate), ["mean over layers", `${percent(mean("gate_closed_ratio"))} of gates closed`])
      : knowsGate() ? tile("gate", "Mean gate", quiet, [window], "words") : tile("gate", "Mean gate", "no gate", ["nothing to measure"], "words"),
    tile("nonfinite", "Non-finite", count(nonfinite), [nonfinite > 0 ? `layer ${bad.sort((a, b) => a - b).slice(0, 4).join(", ")}${bad.length > 4 ? ", …" : ""}` : nonfinite === 0 ? "no NaN or infinity since the start" : ""],
      nonfinite > 0 ? "bad" : ""),
    tile("tokens", "Tokens seen", tokens, [tokensPerSecond()], "lines"));
}

// ---- heatmap -------------------------------------------------------------------------------------------------------

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  paint.font = "11px system-ui, sans-serif";
  return { paint, width, height, ratio };
}

function extent() {
  const end = Math.max(doc.time, last(data.times));
  return { begin: Math.min(end - 60, Math.max(end - view.span, data.times[0] - data.cover[0])), end };
}

function domain() {
  if (!view.metric.log) return [0, 1];
  let low = Infinity;
  let high = 0;
  for (const row of data.rows[view.metric.key] || []) {
    for (const v of row) if (v > 0 && Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  return high ? [nice(low, Math.floor), nice(Math.max(high, 1.01 * low), Math.ceil)] : [1, 10];
}

// Round down or up to 1, 2 or 5 times a power of ten, so that colours hold still from one refresh to the next.
function nice(v, round) {
  const power = 10 ** Math.floor(Math.log10(v) + 1e-9);
  const steps = [1, 2, 5, 10].filter((s) => (round === Math.ceil ? s * power >= v * (1 - 1e-9) : s * power <= v * (1 + 1e-9)));
  return (round === Math.ceil ? steps[0] : last(steps)) * power;
}

function fractionOf(v, [low, high]) {
  return view.metric.log ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low);
}

// The point that stands for a time, or -1 in a gap.
function pointAt(time) {
  let low = 0;
  let high = data.times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.times[middle] < time) low = middle + 1; else high = middle;
  }
  if (low < data.times.length && data.times[low] - time <= 1.6 * data.cover[low]) return low;
  return low > 0 && time - data.times[low - 1] <= 1.6 * data.cover[low - 1] ? low - 1 : -1;
}

function geometry(canvas) {
  const rows = data.order.length;
  const cell = clamp(Math.floor(416 / rows), 4, 28);
  return { ...extent(), rows, cell, plot: canvas.clientWidth - MARGIN.left - MARGIN.right, height: rows * cell };
}

function drawHeat() {
  const canvas = byId("heat");
  const g = geometry(canvas);
  const { paint, ratio } = prepare(canvas, g.height + MARGIN.top + MARGIN.bottom);
  const range = domain();
  const rows = data.rows[view.metric.key] || [];
  const columns = Math.max(1, Math.round(g.plot * ratio));
  const image = new ImageData(columns, g.rows);
  for (let x = 0; x < columns; x++) {
    const row = rows[pointAt(g.begin + ((x + 0.5) / columns) * (g.end - g.begin))] || [];
    for (let y = 0; y < g.rows; y++) {
      const v = row[data.order[y]];
      if (v != null) image.data.set([...(Number.isFinite(v) ? colour(fractionOf(v, range)) : INFINITE), 255], 4 * (y * columns + x));
    }
  }
  const cells = document.createElement("canvas");
  cells.width = columns;
  cells.height = g.rows;
  cells.getContext("2d").putImageData(image, 0, 0);
  hatch(paint, MARGIN.left, MARGIN.top, g.plot, g.height);
  paint.imageSmoothingEnabled = false;
  paint.drawImage(cells, MARGIN.left, MARGIN.top, g.plot, g.height);
  drawLayers(paint, g);
  drawTimes(paint, g, MARGIN.top + g.height);
  drawSwitches(paint, g);
  if (view.cursor) drawCursor(paint, g);
  renderLegend(range);
  const peak = top(view.metric.key);
  canvas.setAttribute("aria-label", `Heatmap of ${view.metric.name}: ${g.rows} layers from ${clock(g.begin)} to ${clock(g.end)}. `
    + (peak ? `Highest now: ${exact(peak.value)} in layer ${peak.layer}. The table below has every layer.` : "No value now."));
}

function hatch(paint, left, topEdge, width, height) {
  paint.save();
  paint.beginPath();
  paint.rect(left, topEdge, width, height);
  paint.clip();
  paint.strokeStyle = style("--hatch");
  paint.lineWidth = 1.5;
  paint.beginPath();
  for (let x = left - height; x < left + width; x += 7) { paint.moveTo(x, topEdge + height); paint.lineTo(x + height, topEdge); }
  paint.stroke();
  paint.restore();
}

function drawLayers(paint, g) {
  paint.fillStyle = style("--muted");
  paint.textAlign = "right";
  paint.textBaseline = "middle";
  const every = [1, 2, 4, 5, 8, 10, 16, 20].find((n) => n * g.cell >= 13) || 32;
  data.order.forEach((index, y) => {
    if (y % every === 0) paint.fillText(layerName(data.layers[index]), MARGIN.left - 6, MARGIN.top + (y + 0.5) * g.cell);
  });
}

function drawTimes(paint, g, y) {
  const wanted = (g.end - g.begin) / Math.max(2, g.plot / 110);
  const every = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600].find((n) => n >= wanted) || 7200;
  paint.fillStyle = style("--muted");
  paint.textAlign = "center";
  paint.textBaseline = "top";
  for (let t = Math.ceil(g.begin / every) * every; t <= g.end; t += every) {
    const x = MARGIN.left + ((t - g.begin) / (g.end - g.begin)) * g.plot;
    paint.fillRect(x, y, 1, 4);
    const text = clock(t, every < 60);
    const half = paint.measureText(text).width / 2;
    paint.fillText(text, clamp(x, half, MARGIN.left + g.plot - half), y + 6);
  }
}

function drawSwitches(paint, g) {
  let free = 0;
  for (const { time, patch, on } of patches().flatMap((p) => p.switches).sort((a, b) => a.time - b.time)) {
    if (time < g.begin) continue;
    const x = Math.round(MARGIN.left + ((time - g.begin) / (g.end - g.begin)) * g.plot);
    for (const [colourName, width, dash] of [["--panel", 4, []], ["--fg", 2, [5, 4]]]) {
      paint.beginPath();
      paint.setLineDash(dash);
      paint.lineWidth = width;
      paint.strokeStyle = style(colourName);
      paint.moveTo(x, MARGIN.top);
      paint.lineTo(x, MARGIN.top + g.height);
      paint.stroke();
    }
    paint.setLineDash([]);
    const text = `${patch} ${on ? "on" : "off"}`;
    const width = paint.measureText(text).width;
    const left = clamp(x - width / 2, MARGIN.left, MARGIN.left + g.plot - width);
    if (left < free) continue;
    free = left + width + 6;
    paint.fillStyle = style("--fg");
    paint.textAlign = "left";
    paint.textBaseline = "top";
    paint.fillText(text, left, 1);
  }
}

function drawCursor(paint, g) {
  const x = MARGIN.left + ((view.cursor.time - g.begin) / (g.end - g.begin)) * g.plot;
  paint.lineWidth = 2;
  paint.strokeStyle = "#fff";
  paint.strokeRect(x - 4, MARGIN.top + view.cursor.y * g.cell - 1, 8, g.cell + 2);
  paint.lineWidth = 1;
  paint.strokeStyle = "#000";
  paint.strokeRect(x - 5, MARGIN.top + view.cursor.y * g.cell - 2, 10, g.cell + 4);
}

function renderLegend([low, high]) {
  const ramp = element("div", "", { class: "ramp" });
  ramp.style.background = `linear-gradient(90deg, ${RAMP.map((c) => `rgb(${c})`).join(", ")})`;
  const middle = view.metric.log ? Math.sqrt(low * high) : 0.5;
  const ticks = [low, +middle.toPrecision(2), high].map((v) => element("span", number(v)));
  const keys = [element("span", view.metric.unit, { class: "key" }), element("span", [element("i", "", { class: "none" }), "no value"], { class: "key" })];
  if (patches().length) keys.push(element("span", [element("i", "", { class: "line" }), "patch switched"], { class: "key" }));
  if (view.metric.log) keys.push(element("span", [element("i", "", { class: "inf" }), "infinite"], { class: "key" }));
  byId("legend").replaceChildren(element("div", [ramp, element("div", ticks, { class: "ticks" })], { class: "scale" }), ...keys);
}

// ---- tooltip -------------------------------------------------------------------------------------------------------

function showTip() {
  const tip = byId("tip");
  const index = view.cursor && data ? pointAt(view.cursor.time) : -1;
  const label = index >= 0 && data.order[view.cursor.y];
  tip.hidden = index < 0 || label == null || byId("heat-box").hidden;
  if (tip.hidden) return;
  const lines = shownMetrics().map((m) => element("div", [element("span", m.name), element("span", exact(data.rows[m.key][index][label]))],
    m === view.metric ? { class: "picked" } : {}));
  tip.replaceChildren(element("b", `layer ${layerName(data.layers[label])} · ${clock(data.times[index])}`), ...lines);
  const g = geometry(byId("heat"));
  const x = MARGIN.left + ((view.cursor.time - g.begin) / (g.end - g.begin)) * g.plot;
  const y = MARGIN.top + view.cursor.y * g.cell;
  const room = byId("heat").clientWidth - tip.offsetWidth;
  tip.style.left = `${clamp(x + 14 > room ? x - tip.offsetWidth - 14 : x + 14, 0, Math.max(0, room))}px`;
  tip.style.top = `${Math.max(0, Math.min(y, MARGIN.top + g.height - tip.offsetHeight))}px`;
}

function setCursor(cursor) {
  view.cursor = cursor;
  if (data && data.times.length && !byId("heat-box").hidden) drawHeat();
  showTip();
}

function onPointer(event) {
  if (!data || !data.times.length) return;
  const g = geometry(event.target);
  const y = Math.floor((event.offsetY - MARGIN.top) / g.cell);
  const along = (event.offsetX - MARGIN.left) / g.plot;
  setCursor(y >= 0 && y < g.rows && along >= 0 && along <= 1 ? { y, time: g.begin + along * (g.end - g.begin) } : null);
}

function onKey(event) {
  const move = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (event.key === "Escape") setCursor(null);
  if (!move || !data || !data.times.length) return;
  event.preventDefault();
  const at = view.cursor ? pointAt(view.cursor.time) : -1;
  const point = at < 0 ? data.times.length - 1 : clamp(at + move[0], 0, data.times.length - 1);
  const y = view.cursor ? clamp(view.cursor.y + move[1], 0, data.order.length - 1) : 0;
  setCursor({ y, time: data.times[point] });
}

// ---- table ---------------------------------------------------------------------------------------------------------

const COLUMNS = [
  { key: "activation_abs_max", name: "max |h|", show: number, log: true },
  { key: "activation_median", name: "median |h|", show: number },
  { key: "activation_max_to_median_ratio", name: "max / median", show: number, log: true },
  { key: "activation_kurtosis", name: "kurtosis", show: number, log: true },
  { key: "activation_top_channel", name: "top channel", show: (v) => (v == null ? "–" : String(v)) },
  { key: "attention_sink_mass", name: "sink mass", show: share, unit: true },
  { key: "attention_sink_heads", name: "sink heads", of: "attention_heads", show: number },
  { key: "attention_entropy_ratio", name: "entropy", show: share, unit: true },
  { key: "gate_mean", name: "gate mean", show: share, unit: true, gate: true },
  { key: "gate_closed_ratio", name: "gate closed", show: percent, unit: true, gate: true },
];

function barWidth(column, v, values) {
  if (v == null || !(column.log || column.unit || column.of)) return 0;
  if (!Number.isFinite(v)) return 1;
  if (!column.log) return clamp(v, 0, 1);
  const positive = values.filter((x) => x > 0 && Number.isFinite(x));
  const low = Math.min(...positive) / 2;
  return v > 0 ? Math.log(v / low) / Math.log(Math.max(...positive) / low) : 0;
}

function renderTable() {
  const empty = !data || !hasTraffic();
  byId("table-box").hidden = empty;
  byId("table-empty").hidden = !empty;
  if (empty) { byId("table-empty").textContent = whyEmpty(); return; }
  const columns = COLUMNS.filter((c) => !c.gate || knowsGate());
  byId("table").tHead.replaceChildren(element("tr", ["layer", ...columns.map((c) => c.name)].map((n) => element("th", n, { scope: "col" }))));
  const valuesOf = (key) => (data.latest[key] || last(data.rows[key]) || []);
  const body = data.order.map((index) => {
    const bad = valuesOf("nonfinite_total")[index];
    const label = [layerName(data.layers[index]), ...(bad > 0 ? [element("em", `${count(bad)} non-finite`)] : [])];
    const cells = columns.map((c) => {
      const values = valuesOf(c.key);
      const whole = c.of && valuesOf(c.of)[index];
      const v = values[index];
      const bar = element("i");
      bar.style.width = `calc(${(100 * barWidth(c, whole ? v / whole : v, values)).toFixed(1)}% * .92)`;
      return element("td", [bar, element("span", whole ? `${c.show(v)} / ${number(whole)}` : c.show(v))], { "data-key": c.key });
    });
    return element("tr", [element("th", label, { scope: "row" }), ...cells], { "data-layer": layerName(data.layers[index]) });
  });
  byId("table").tBodies[0].replaceChildren(...body);
}

// ---- patch lane ----------------------------------------------------------------------------------------------------

function renderLane() {
  const lanes = data ? patches() : [];
  byId("lane").hidden = byId("switches").hidden = !lanes.length;
  byId("lane-empty").hidden = lanes.length > 0;
  if (!lanes.length) {
    byId("lane-empty").textContent = data ? "No patch is installed: the model runs as released." : whyEmpty();
    return;
  }
  const g = geometry(byId("lane"));
  const height = 42 * lanes.length;
  const { paint } = prepare(byId("lane"), height + MARGIN.bottom);
  const xOf = (t) => MARGIN.left + (clamp((t - g.begin) / (g.end - g.begin), 0, 1)) * g.plot;
  lanes.forEach(({ patch, runs }, i) => {
    const y = 42 * i + 16;
    paint.textBaseline = "top";
    paint.textAlign = "left";
    paint.fillStyle = style("--fg");
    paint.fillText(patch, MARGIN.left, y - 15);
    hatch(paint, MARGIN.left, y, g.plot, 20);
    for (const run of runs) {
      const left = xOf(run.from);
      const width = Math.max(1, xOf(run === last(runs) ? Math.max(run.to, Math.min(g.end, run.to + 3 * doc.period_seconds)) : run.to) - left);
      paint.fillStyle = run.on ? style("--accent") : style("--panel");
      paint.fillRect(left, y, width, 20);
      paint.strokeStyle = run.on ? style("--accent") : style("--off");
      paint.lineWidth = 1;
      paint.strokeRect(left + 0.5, y + 0.5, Math.max(0, width - 1), 19);
      if (width < 28) continue;
      paint.fillStyle = run.on ? style("--panel") : style("--muted");
      paint.textBaseline = "middle";
      paint.fillText(run.on ? "on" : "off", left + 7, y + 10.5);
    }
  });
  drawTimes(paint, g, height);
  const switches = lanes.flatMap((l) => l.switches).sort((a, b) => b.time - a.time);
  const said = switches.slice(0, 12).map((s) => `${clock(s.time)} ${s.patch} switched ${s.on ? "on" : "off"}`);
  if (switches.length > 12) said.push(`and ${switches.length - 12} earlier`);
  byId("switches").replaceChildren(...(said.length ? said : ["No switch in the span shown."]).map((s) => element("li", s)));
  byId("lane").setAttribute("aria-label", `Patches over time: ${lanes.map((l) => `${l.patch} ${counted("patch_enabled", l.patch) ? "on" : "off"} now`).join(", ")}; switches are listed below.`);
}

// ---- all of it -----------------------------------------------------------------------------------------------------

const shownMetrics = () => METRICS.filter((m) => m.key !== "gate_mean" || (data && knowsGate()));

function renderHeat() {
  const empty = !data || !data.times.length || !data.order.length || lastSeen() == null;
  byId("heat-box").hidden = byId("legend").hidden = byId("heat-keys").hidden = empty;
  byId("heat-empty").hidden = !empty;
  byId("heat-empty").textContent = empty ? whyEmpty() : "";
  if (!shownMetrics().includes(view.metric)) { view.metric = METRICS[0]; byId("metrics").querySelector("input").checked = true; }
  for (const input of byId("metrics").querySelectorAll("input")) {
    input.parentNode.hidden = !shownMetrics().some((m) => m.key === input.value);
  }
  byId("heat-text").textContent = view.metric.text;
  if (!empty) drawHeat();
  showTip();
}

function render() {
  renderHeader();
  renderTiles();
  renderHeat();
  renderTable();
  renderLane();
  renderSpans();
}

function renderSpans() {
  const picker = byId("span");
  if (!doc || picker.options.length) return;
  const spans = [...new Set([300, 900, 3600, 10800].filter((s) => s < doc.history_seconds).concat(doc.history_seconds))];
  picker.replaceChildren(...spans.map((s) => element("option", `last ${duration(s)}`, { value: s })));
  view.span = spans.includes(900) ? 900 : last(spans);
  picker.value = view.span;
}

for (const metric of METRICS) {
  const input = element("input", "", { type: "radio", name: "metric", value: metric.key });
  input.checked = metric === view.metric;
  input.addEventListener("change", () => { view.metric = metric; render(); });
  byId("metrics").append(element("label", [input, element("span", metric.name)]));
}
byId("engine").addEventListener("change", (event) => { view.engine = event.target.value; data = null; poll(true); });
byId("span").addEventListener("change", (event) => { view.span = Number(event.target.value); poll(true); });
byId("heat").addEventListener("pointermove", onPointer);
byId("heat").addEventListener("pointerdown", onPointer);
byId("heat").addEventListener("pointerleave", () => setCursor(null));
byId("heat").addEventListener("blur", () => setCursor(null));
byId("heat").addEventListener("keydown", onKey);
new ResizeObserver(() => { if (data && data.times.length) { renderHeat(); renderLane(); } }).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && render());
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
setInterval(() => !document.hidden && renderHeader(), 1000);
poll(true);
