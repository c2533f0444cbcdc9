// Maps of layers over time, one under the other on one time axis, with one cursor through all of them.

import { $, clamp, clock, exact, explain, fill, finite, make, put } from "./dom.js";
import { actingAt, pointAt, pointsAcross, renderMarks } from "./timeline.js";

const RAMP = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis
const MARKED = [224, 33, 138]; // infinite, or clipped by a format
const SHADES = 256;
const COLOURS = Array.from({ length: SHADES }, (_, i) => {
  const at = (i / (SHADES - 1)) * (RAMP.length - 1);
  const stop = Math.min(Math.floor(at), RAMP.length - 2);
  return [...RAMP[stop].map((c, k) => Math.round(c + (at - stop) * (RAMP[stop + 1][k] - c))), 255];
});
const gradient = (low) => `linear-gradient(90deg, ${(low ? [...RAMP].reverse() : RAMP).map((c) => `rgb(${c})`)})`;

let shown = []; // maps: { metric, key, plot, canvas, cursor, tip, ... }
let now = null; // what was drawn last: { past, axis, lanes, across }
let cursor = null; // { time, y, in: map }

// Snapped to quarters of a decade, so that colours hold still between two refreshes.
function range(past, { metric, key }) {
  let [low, high] = [Infinity, 0];
  for (const r of past.points[key] ?? []) for (const v of finite(r ?? [])) [low, high] = [Math.min(low, v), Math.max(high, v)];
  if (!metric.log) return [0, metric.snug && high ? [0.25, 0.5].find((top) => high <= top) ?? 1 : 1];
  if (metric.low) low = Math.max(low, 1);
  return high > low ? [10 ** (Math.floor(4 * Math.log10(low)) / 4), 10 ** (Math.floor(4 * Math.log10(high) + 1) / 4)] : [1, 10];
}

function colour(v, metric, [low, high]) {
  if (!Number.isFinite(v) || (metric.low && v < 1)) return [...MARKED, 255];
  const part = metric.log ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low);
  return COLOURS[Math.round((SHADES - 1) * clamp(metric.low ? 1 - part : part, 0, 1))];
}

// A map's elements stay from one refresh to the next; they are made anew when other maps are asked for.
function build(metric, key) {
  const part = (tag, name, attributes) => make(tag, "", { class: name, ...attributes });
  const map = { metric, key, title: part("b"), unit: part("span", "unit"), ramp: part("i", "ramp"), low: part("span", "tick"), high: part("span", "tick"),
    canvas: part("canvas", "heat", { tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-describedby": "keys" }),
    layers: part("div", "layers", { "aria-hidden": "true" }), marks: part("div", "marks", { "aria-hidden": "true" }),
    cursor: part("i", "cursor", { hidden: "" }), tip: part("div", "tip", { hidden: "", "aria-hidden": "true" }) };
  map.ramp.style.background = gradient(metric.low);
  map.plot = make("div", [map.canvas, map.layers, map.marks, map.cursor, map.tip], { class: "plot" });
  const caption = make("figcaption", [map.title, make("span", [map.low, map.ramp, map.high], { class: "scale" }), map.unit]);
  map.figure = make("figure", [caption, map.plot], { "data-key": metric.key });
  map.canvas.onpointermove = map.canvas.onpointerdown = (event) => onPointer(map, event);
  // A finger leaves when it is lifted; what it pointed at stays to be read.
  map.canvas.onpointerleave = (event) => event.pointerType === "mouse" && setCursor(null);
  map.canvas.onblur = () => setCursor(null);
  map.canvas.onkeydown = (event) => onKey(map, event);
  return map;
}

export function renderMaps(past, wanted, axis, lanes, name) {
  if (`${wanted.map((w) => w.key)}` !== `${shown.map((m) => m.key)}`) {
    cursor = null;
    shown = wanted.map(({ metric, key }) => build(metric, key));
    $.maps.replaceChildren(...shown.map((m) => m.figure));
  }
  const empty = !past.engine || !past.points.times.some((_, i) => past.measured(i));
  $.help.hidden = empty;
  now = null;
  if (explain($.heatBox, $.heatEmpty, empty && (past.busy ? "Not measured: its probe is not installed, or has not sampled a token yet." : past.whyEmpty()))) return;
  const width = Math.max(1, shown[0].plot.clientWidth);
  now = { past, axis, lanes, across: pointsAcross(past, axis, width), width };
  $.infKey.hidden = $.clipKey.hidden = true;
  for (const map of shown) renderMap(map, name(map));
  $.switchKey.hidden = !past.switches.length;
  renderCursor();
}

// Values of the newest point that has any.
function nowOf({ key }) {
  return now.past.points[key]?.findLast((r) => r?.length) ?? [];
}

function renderMap(map, name) {
  const { past, axis, across, width } = now;
  const order = past.engine.order;
  const height = order.length;
  const [room, least, most] = shown.length > 1 ? [132, 2, 18] : [416, 4, 28];
  const cell = clamp(Math.floor(room / height), least, most);
  const scale = range(past, map);
  const image = new ImageData(width, height);
  across.forEach((at, x) => {
    const values = past.row(map.key, at);
    order.forEach((index, y) => {
      const v = values[index];
      if (v == null) return;
      if (!Number.isFinite(v)) $.infKey.hidden = false;
      else if (map.metric.low && v < 1) $.clipKey.hidden = false;
      image.data.set(colour(v, map.metric, scale), 4 * (y * width + x));
    });
  });
  Object.assign(map.canvas, { width, height }).getContext("2d").putImageData(image, 0, 0);
  map.canvas.style.height = `${cell * height}px`;
  const peak = past.extreme(nowOf(map), map.metric.low);
  map.canvas.ariaLabel = `${name}: ${height} layers from ${clock(axis.begin)} to ${clock(axis.end)}; ${
    peak ? `${map.metric.low ? "lowest" : "highest"} now ${exact(peak.value)} in ${peak.text}` : "no value now"}`;
  put(map.title, name);
  put(map.unit, map.metric.unit);
  put(map.low, exact(+scale[0].toPrecision(2)));
  put(map.high, exact(+scale[1].toPrecision(2)));
  const every = [1, 2, 4, 8, 16, 32].find((n) => n * cell >= 14) ?? 64;
  fill(map.layers, order.map((i) => past.layer(i)).flatMap((text, y) => (y % every ? [] : [make("span", text, {}, { top: `${(100 * (y + 0.5)) / height}%` })])));
  renderMarks(map.marks, past.switches, axis, width, map === shown[0]);
}

function valuesAt(at, index) {
  const { past } = now;
  return shown.map(({ metric, key }) => ({ metric, name: metric.name, value: past.row(key, at)[index], usual: past.baseline(key)[index] }));
}

const placeOf = (at, index) => `layer ${now.past.layer(index)} · ${clock(now.past.points.times[at])}`;

function renderCursor() {
  const at = cursor && now ? pointAt(now.past, cursor.time) : -1;
  const index = now?.past.engine.order[cursor?.y];
  const visible = at >= 0 && index != null;
  for (const map of shown) {
    map.cursor.hidden = !visible;
    map.tip.hidden = !visible || map !== cursor.in;
    if (!visible) continue;
    const left = (now.axis.place(cursor.time) / 100) * now.width;
    const cell = map.canvas.clientHeight / now.past.engine.order.length;
    Object.assign(map.cursor.style, { left: `${left}px`, top: `${cursor.y * cell}px`, height: `${cell}px` });
    if (map === cursor.in) renderTip(map, at, index, left, cell);
  }
}

function renderTip(map, at, index, left, cell) {
  const { past, lanes, width } = now;
  fill(map.tip, [make("b", placeOf(at, index)),
    ...valuesAt(at, index).map(({ metric, name, value, usual }) => make("p", [make("span", name),
      make("span", exact(value) + (usual == null ? "" : ` (baseline ${exact(usual)})`))], metric === map.metric ? { class: "picked" } : {})),
    ...actingAt(lanes, past.points.times[at]).map((words) => make("p", words))]);
  const right = left + 14 + map.tip.offsetWidth > width;
  Object.assign(map.tip.style, { left: `${clamp(right ? left - 14 - map.tip.offsetWidth : left + 14, -20, Math.max(-20, width - map.tip.offsetWidth))}px`,
    top: `${clamp(cursor.y * cell, 0, Math.max(0, map.canvas.clientHeight - map.tip.offsetHeight))}px` });
}

// Spoken for the keyboard only: a mouse would make a screen reader talk without end.
function say() {
  const at = cursor && now ? pointAt(now.past, cursor.time) : -1;
  if (at < 0) return ($.said.textContent = "");
  const index = now.past.engine.order[cursor.y];
  const values = valuesAt(at, index).map(({ name, value }) => `${name} ${value == null ? "no value" : exact(value)}`);
  $.said.textContent = [placeOf(at, index), ...values, ...actingAt(now.lanes, now.past.points.times[at])].join("; ");
}

function setCursor(cell) {
  cursor = cell;
  renderCursor();
}

function onPointer(map, { offsetX, offsetY }) {
  const { begin, end } = now.axis;
  const y = clamp(Math.floor((offsetY / map.canvas.clientHeight) * now.past.engine.order.length), 0, now.past.engine.order.length - 1);
  setCursor({ in: map, y, time: begin + (offsetX / map.canvas.clientWidth) * (end - begin) });
}

const MOVES = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0], PageUp: [0, -10], PageDown: [0, 10], Home: [-Infinity, 0], End: [Infinity, 0] };

function onKey(map, event) {
  if (event.key === "Escape") setCursor(null);
  const move = MOVES[event.key];
  if (move) {
    event.preventDefault();
    const { times } = now.past.points;
    const rows = now.past.engine.order.length - 1;
    const old = cursor ? times.findIndex((t) => t >= cursor.time - 1e-6) : times.length - 1;
    const at = clamp((old < 0 ? times.length - 1 : old) + move[0], 0, times.length - 1);
    setCursor({ in: map, time: times[at], y: cursor ? clamp(cursor.y + move[1], 0, rows) : clamp(move[1], 0, 0) });
  }
  if (move || event.key === "Escape") say();
}

// The same values as tables: at most eight times, so that a screen reader can walk through them.
export function valueTables(past, name) {
  const { times } = past.points;
  const step = Math.max(1, Math.ceil(times.length / 8));
  const picks = times.map((_, i) => i).filter((i) => (times.length - 1 - i) % step === 0);
  return shown.map((map) => make("table", [
    make("caption", `${name(map)}, as of ${clock(past.answer.time)}`),
    make("thead", make("tr", ["layer", ...picks.map((i) => clock(times[i]))].map((text) => make("th", text, { scope: "col" })))),
    make("tbody", past.engine.order.map((index) => make("tr", [make("th", past.layer(index), { scope: "row" }), ...picks.map((i) => make("td", exact(past.row(map.key, i)[index])))]))),
  ]));
}
