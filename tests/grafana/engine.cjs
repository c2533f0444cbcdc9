// Run dashboards through Grafana's own data code: every variable, annotation and query on a real Prometheus, the
// answers through the transformations, overrides and display processors of @grafana/data, in each version asked for.
//
//   node engine.cjs JOB.json     {"url", "from", "to", "scrape", "versions": ["10.4", ...], "boards": [paths], "report": path}
//
// Writes {path: {version: {faults: [{where, what}], empty: [where], panels: {title: {fields, shown}}, events: {}}}}.
'use strict';
const fs = require('fs');
const path = require('path');
const esbuild = require('esbuild');
const { JSDOM } = require('jsdom');
const { lastValueFrom } = require('rxjs');
const { wire } = require('./prepare.cjs');
const { Source } = require('./source.cjs');

pretendBrowser();

async function main() {
  const job = JSON.parse(fs.readFileSync(process.argv[2]));
  const source = new Source(job);
  const grafana = Object.fromEntries(job.versions.map((version) => [version, load(version)]));
  const report = {};
  for (const file of job.boards) {
    const board = JSON.parse(fs.readFileSync(file));
    const answers = await ask(board, source);
    report[file] = {};
    for (const version of job.versions) {
      report[file][version] = await check(board, answers, grafana[version], job);
    }
  }
  // Not to stdout, where some versions of the libraries print warnings.
  fs.writeFileSync(job.report, JSON.stringify(report));
}

// ---------------------------------------------------------------------------------------------- what Prometheus says
async function ask(board, source) {
  const answers = { faults: [], empty: [], events: {}, panels: new Map() };
  const guarded = async (where, action) => {
    try { return await action(); } catch (error) { answers.faults.push({ where, what: error.message }); return null; }
  };
  source.forget();
  for (const variable of board.templating.list) {
    const values = await guarded(`variable ${variable.name}`, () => source.variable(variable));
    if (values && !values.length) answers.empty.push(`variable ${variable.name}`);
  }
  for (const annotation of board.annotations.list.filter((one) => one.expr)) {
    const where = `annotation ${annotation.name}`;
    const events = await guarded(where, () => source.events(annotation));
    if (events && !events.length) answers.empty.push(where);
    answers.events[annotation.name] = events ?? [];
  }
  for (const panel of panels(board)) {
    const answered = [];
    for (const target of panel.targets) {
      const where = `${panel.title}, ${target.refId}`;
      const result = await guarded(where, () => source.target(panel, target));
      if (!result) continue;
      if (!result.length) answers.empty.push(where);
      answered.push({ target, result });
    }
    answers.panels.set(panel, answered);
  }
  return answers;
}

function panels(board) {
  return board.panels.flatMap((panel) => (panel.type === 'row' ? panel.panels : [panel]));
}

// ------------------------------------------------------------------------------------------------ what Grafana makes
async function check(board, answers, grafana, job) {
  const report = { faults: [...answers.faults], empty: [...answers.empty], panels: {}, events: answers.events };
  for (const [panel, answered] of answers.panels) {
    const fail = (what) => report.faults.push({ where: panel.title, what });
    try {
      if (!answered.some(({ result }) => result.length)) continue;
      const frames = await grafana.prepare(panel, answered, fail);
      look(panel, frames, grafana, fail);
      report.panels[panel.title] = describe(panel, frames, grafana);
    } catch (error) {
      fail(`${error.message}`);
    }
  }
  return report;
}

function look(panel, frames, grafana, fail) {
  const { data } = grafana;
  const fields = frames.flatMap((frame) => frame.fields.map((field) => ({ frame, field })));
  const names = fields.map(({ frame, field }) => data.getFieldDisplayName(field, frame, frames));
  for (const override of panel.fieldConfig.overrides) {
    if (override.matcher.id !== 'byName') fail(`override by ${override.matcher.id}: not used here`);
    else if (!names.includes(override.matcher.options)) fail(`override matches no field: ${override.matcher.options}`);
  }
  const units = [panel.fieldConfig.defaults.unit, panel.options.cellValues?.unit,
    ...panel.fieldConfig.overrides.flatMap((one) => one.properties.filter((p) => p.id === 'unit').map((p) => p.value))];
  for (const unit of units.filter(Boolean)) if (!grafana.knows(unit)) fail(`unknown unit ${unit}`);
  const numbers = fields.filter(({ field }) => field.type === 'number');
  if (!numbers.length) fail('no number is left to show');
  for (const { frame, field } of numbers) {
    const name = data.getFieldDisplayName(field, frame, frames);
    if (!field.display) fail(`${name}: no display processor`);
    if (!field.values.length || Array.from(field.values).every((value) => value == null || Number.isNaN(value))) {
      fail(`${name}: nothing but empty values`);
    }
    if (/\{\{|\bValue\b/.test(name)) fail(`a legend that says nothing: ${name}`);
  }
  if (panel.type === 'table') {
    if (frames.length !== 1) fail(`a table of ${frames.length} frames`);
    if (names.some((name) => /^(Value|__name__|job)/.test(name))) fail(`columns ${names}`);
    for (const { frame, field } of numbers) {
      const missing = Array.from(field.values).filter((value) => value == null).length;
      // Rows that do not merge leave every row with holes; some holes are engines without a gate.
      if (missing > frame.length * 0.67) fail(`${data.getFieldDisplayName(field, frame, frames)}: rows do not merge`);
    }
  }
  if (panel.type === 'heatmap') {
    const rows = numbers.map(({ frame, field }) => data.getFieldDisplayName(field, frame, frames));
    if (rows.join() !== [...rows].sort((a, b) => Number(a) - Number(b)).join()) fail(`rows out of order: ${rows}`);
    if (new Set(rows).size !== rows.length) fail(`a layer has more than one row: ${rows}`);
    if (rows.some((row) => Number.isNaN(Number(row)))) fail(`rows that are no layers: ${rows}`);
  }
  if (panel.type === 'state-timeline') {
    const mapped = new Set(panel.fieldConfig.defaults.mappings.flatMap((one) => Object.keys(one.options)));
    for (const { field } of numbers) {
      const odd = Array.from(field.values).filter((value) => value != null && !mapped.has(String(value)));
      if (odd.length) fail(`states without a name: ${[...new Set(odd)].slice(0, 5)}`);
    }
  }
  if (numbers.length > 128) fail(`${numbers.length} series`);
}

function describe(panel, frames, grafana) {
  const { data } = grafana;
  const text = (field, value) => {
    if (!field.display) return String(value);
    const shown = field.display(value);
    return { text: data.formattedValueToString(shown), color: shown.color };
  };
  const fields = frames.flatMap((frame) => frame.fields.filter((field) => field.type === 'number')
    .map((field) => ({ frame, field })));
  const shown = fields.map(({ frame, field }) => {
    const values = Array.from(field.values).filter((value) => value != null);
    const states = panel.type === 'state-timeline' ? [...new Set(values)].map((v) => text(field, v).text) : undefined;
    return { name: data.getFieldDisplayName(field, frame, frames), states,
      last: text(field, data.reduceField({ field, reducers: ['lastNotNull'] }).lastNotNull) };
  });
  const report = { shown };
  if (panel.type === 'table') {
    const [frame] = frames;
    report.columns = frame.fields.map((field) => data.getFieldDisplayName(field, frame, frames));
    report.rows = Array.from({ length: frame.length }, (_, row) => frame.fields.map((field) => {
      const value = field.values[row];
      return value == null ? '' : text(field, value).text ?? String(value);
    }));
  }
  return report;
}

// --------------------------------------------------------------------------------------------------- one @grafana/data
// Bundled, because the packages mix module systems in a way that Node before 20.19, such as Debian 12's, refuses.
function load(version) {
  const bundle = path.join(__dirname, `node_modules/.cache/grafana-data-${version}.cjs`);
  if (!fs.existsSync(bundle)) {
    esbuild.buildSync({ entryPoints: [require.resolve(`grafana-data-${version}`)], outfile: bundle, bundle: true,
      platform: 'node', format: 'cjs', logLevel: 'error' });
  }
  return wire(require(bundle), lastValueFrom);
}

function pretendBrowser() {
  const { window } = new JSDOM('<!doctype html><body></body>', { url: 'http://localhost/' });
  const copied = ['document', 'localStorage', 'HTMLElement', 'Element', 'Node', 'getComputedStyle', 'MutationObserver',
    'DOMParser'];
  for (const name of copied) global[name] = window[name];
  global.window = window;
  Object.defineProperty(global, 'navigator', { value: window.navigator, configurable: true });
  window.matchMedia = global.matchMedia = () => ({ matches: false, addListener() {}, removeListener() {} });
  global.ResizeObserver = class { observe() {} disconnect() {} };
  global.requestAnimationFrame = (action) => setTimeout(action, 0);
}

main().catch((error) => { console.error(error); process.exit(1); });
