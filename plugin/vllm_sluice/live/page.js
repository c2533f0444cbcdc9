// Asks the server, keeps what the reader chose, and draws.

import { $, clamp, fill, make, put } from "./dom.js";
import { renderMaps, valueTables } from "./heat.js";
import { HEADROOM, MAPS, variantName } from "./metrics.js";
import { Past } from "./past.js";
import { renderHeader, renderStatus, renderTiles } from "./status.js";
import { renderLayers, renderPositions, renderQuantization } from "./tables.js";
import { axisOf, lanesOf, renderLanes } from "./timeline.js";

const OVERVIEW = "overview";
const SPANS = [[900, "15 min"], [3600, "1 h"], [10800, "3 h"]];
const POINTS = [360, 720]; // with the fewest, those of three hours are still less than a measuring window apart

const past = new Past();
// What the reader chose; in the address too, so that a link shows another person the same.
const choice = { span: 900, show: OVERVIEW, engine: "0", format: "fp8_e4m3:none" };
let paused = false;
let turn = 0;
let timer;

// The maps that the choice asks for: { metric, key }
function mapsAmong(metrics) {
  const single = metrics.find((m) => m.key === choice.show);
  return (single ? [single] : metrics.filter((m) => m.overview)).map((metric) => ({ metric, key: metric.key === HEADROOM ? `${HEADROOM}:${choice.format}` : metric.key }));
}

const wantedMaps = () => mapsAmong(MAPS.filter((m) => !m.needs || past.has(m.needs)));
// Before the first answer it is not known what is measured: asks for both.
const wantedRows = () => [...new Set([...mapsAmong(MAPS), ...wantedMaps()].map((m) => m.key))];

async function ask(anew) {
  const query = new URLSearchParams({ since: anew ? -choice.span : past.since, engine: choice.engine, metrics: wantedRows(), span: choice.span });
  if (anew) query.set("points", clamp(document.body.clientWidth, ...POINTS));
  else query.set("step", past.step);
  const patience = Math.max(5, 3 * (past.answer?.period_seconds ?? 2));
  let received;
  try {
    received = await fetch(`live.json?${query}`, { signal: AbortSignal.timeout(1000 * patience) });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? `nothing within ${patience} s` : "it cannot be reached");
  }
  if (!received.ok) throw new Error(`it answers ${received.status}${received.status === 404 ? ", the live page may be switched off" : ""}`);
  const answer = await received.json().catch((error) => {
    throw new Error(error.name === "TimeoutError" ? `no complete answer within ${patience} s` : "its answer is not JSON");
  });
  if (!answer?.engines || !answer.times) throw new Error("its answer has another form; reload the page");
  return answer;
}

async function poll(anew = false) {
  const mine = ++turn;
  clearTimeout(timer);
  anew ||= past.since == null;
  try {
    const answer = await ask(anew);
    if (mine !== turn) return;
    past.accept(answer, choice.engine, choice.span, anew);
    if (anew) past.step = answer.step;
    if (past.engine) choice.engine = past.engine.engine;
    // Not measured in this format: take another.
    if (past.variants.length && !past.variants.includes(choice.format)) {
      choice.format = past.variants[0];
      return poll(true);
    }
  } catch (error) {
    if (mine !== turn) return;
    past.lost = { since: past.lost?.since ?? past.now, why: error.message };
  }
  render();
  if (!paused) timer = setTimeout(poll, 1000 * Math.max(1, past.answer?.period_seconds ?? 2));
}

const mapName = ({ metric, key }) => (metric.key === HEADROOM ? `${metric.name}, ${variantName(key.slice(HEADROOM.length + 1))}` : metric.name);

function render() {
  renderHeader(past, paused);
  renderStatus(past);
  renderTiles(past, choice.format);
  renderControls();
  const lanes = past.engine ? lanesOf(past) : [];
  const axis = past.points.times.length ? axisOf(past, choice.span) : null;
  renderMaps(past, wantedMaps(), axis, lanes, mapName);
  renderLanes(past, lanes, axis);
  renderPositions(past);
  renderQuantization(past);
  renderLayers(past, choice.format);
}

// Choices

function radios(box, name, options, choose) {
  for (const [value, text] of options) {
    const input = make("input", "", { type: "radio", name, value });
    input.onchange = () => choose(value);
    box.append(make("label", [input, make("span", text)]));
  }
}

function renderControls() {
  const maps = wantedMaps();
  const single = maps.length === 1 && choice.show !== OVERVIEW;
  for (const input of $.metrics.querySelectorAll("input")) {
    const map = MAPS.find((m) => m.key === input.value);
    input.parentNode.hidden = !!map?.needs && !past.has(map.needs);
    input.checked = input.value === (single ? choice.show : OVERVIEW);
  }
  for (const input of $.spans.querySelectorAll("input")) {
    input.checked = +input.value === choice.span;
    input.parentNode.hidden = past.answer && +input.value > Math.max(SPANS[0][0], past.answer.history_seconds) && !input.checked;
  }
  put($.about, single ? maps[0].metric.about : "One time axis and one cursor for all. Good: even rows, and changes only where a patch was switched.");
  $.formats.hidden = !past.has(HEADROOM);
  fill($.format, past.variants.map((v) => make("option", variantName(v), { value: v })));
  $.format.value = choice.format;
}

function choose(changed) {
  Object.assign(choice, changed);
  history.replaceState(null, "", `#${new URLSearchParams(choice)}`);
  poll(true);
}

function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (SPANS.some(([s]) => s === +given.span)) choice.span = +given.span;
  for (const key of ["show", "engine", "format"]) if (given[key]) choice[key] = given[key];
}

function setTheme(theme) {
  document.documentElement.dataset.theme = $.theme.value = theme;
}

radios($.metrics, "metric", [[OVERVIEW, "overview"], ...MAPS.map((m) => [m.key, m.name])], (show) => choose({ show }));
radios($.spans, "span", SPANS, (span) => choose({ span }));
$.engine.onchange = () => choose({ engine: $.engine.value });
$.format.onchange = () => choose({ format: $.format.value });
$.pause.onclick = () => {
  paused = !paused;
  $.pause.textContent = paused ? "Resume" : "Pause";
  if (!paused) return poll();
  turn++; // or an answer on its way would still change the picture
  clearTimeout(timer);
  render();
};
$.theme.onchange = () => {
  setTheme($.theme.value);
  try {
    localStorage.setItem("sluice-theme", $.theme.value);
  } catch {} // storage may be forbidden; the choice then lasts as long as the page
};
try {
  setTheme({ light: "light", dark: "dark" }[localStorage.getItem("sluice-theme")] ?? "auto");
} catch {}
// Tables of the past are made when opened and then hold still: a reader walks through them.
$.values.ontoggle = () => $.valueTables.replaceChildren(...($.values.open && past.points.times.length ? valueTables(past, mapName) : []));
onresize = () => past.answer && render();
onhashchange = () => {
  readAddress();
  poll(true);
};
document.onvisibilitychange = () => (document.hidden ? clearTimeout(timer) : paused || poll());
setInterval(() => renderHeader(past, paused), 1000);
readAddress();
renderControls();
poll(true);
