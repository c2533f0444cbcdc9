// Type-check dashboards against @grafana/schema: the dashboard as a whole, and each panel's options, field options and
// queries against the types of its own plugin.
//
//   node types.cjs VERSION BOARD.json...      prints [{file, where, what}]
'use strict';
const fs = require('fs');
const path = require('path');
const ts = require('typescript');

const PLUGIN = { timeseries: 'timeseries', heatmap: 'heatmap', stat: 'stat', bargauge: 'bargauge', table: 'table',
  'state-timeline': 'statetimeline' };

// The schema's string enums refuse the strings that stand in JSON; `Plain` is the same type with their values.
// Options that are left out get their defaults from the plugin, so nothing is required.
const PLAIN = `
type Plain<T> = unknown extends T ? T : T extends string ? \`\${T}\` : T extends number | boolean | null | undefined ? T
  : T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]?: Plain<T[K]> } : T;
`;

function schemaFolder(version) {
  const data = path.dirname(path.dirname(require.resolve(`grafana-data-${version}`)));
  for (let folder = data; folder !== path.dirname(folder); folder = path.dirname(folder)) {
    const found = path.join(folder, 'node_modules/@grafana/schema');
    if (!fs.existsSync(found)) continue;
    const { version: there } = JSON.parse(fs.readFileSync(path.join(found, 'package.json')));
    if (!there.startsWith(`${version}.`)) throw new Error(`@grafana/schema ${there} beside @grafana/data ${version}`);
    return found;
  }
  throw new Error(`no @grafana/schema for ${version}`);
}

function plugin(schema, kind, needed = true) {
  for (const types of ['dist/types', 'dist/esm']) {
    const folder = path.join(schema, types, 'raw/composable', kind);
    const [file] = fs.existsSync(folder) ? fs.readdirSync(folder).filter((name) => name.endsWith('types.gen.d.ts')) : [];
    if (file) return path.join(folder, file).replace(/\.d\.ts$/, '');
  }
  if (!needed) return null;
  throw new Error(`no types for ${kind} in ${schema}`);
}

function index(schema) {
  const found = ['dist/types/index.d.ts', 'dist/index.d.ts', 'dist/cjs/index.d.cts', 'dist/types/index.d.cts']
    .map((file) => path.join(schema, file)).find((file) => fs.existsSync(file));
  if (!found) throw new Error(`no types in ${schema}`);
  return found.replace(/\.d\.(c?)ts$/, (_, c) => (c ? '.cjs' : ''));
}

// One assignment a thing, so that an error names the thing.
function source(board, schema) {
  const lines = [PLAIN, `import type * as s from ${JSON.stringify(index(schema))};`];
  const names = new Map();
  for (const [kind, folder] of Object.entries(PLUGIN)) {
    names.set(kind, `plugin_${folder}`);
    lines.push(`import type * as plugin_${folder} from ${JSON.stringify(plugin(schema, `${folder}/panelcfg/x`))};`);
  }
  // Of queries only 10.4 brings the type; later it belongs to the data source's own package.
  const query = plugin(schema, 'prometheus/dataquery/x', false);
  if (query) lines.push(`import type * as prometheus from ${JSON.stringify(query)};`);
  const places = [];
  const claim = (where, type, value) => {
    places.push({ line: lines.join('\n').split('\n').length, where });
    lines.push(`export const claim${places.length}: Plain<${type}> = ${JSON.stringify(value)};`);
  };
  const { panels, templating, annotations, ...rest } = board;
  claim('board', 's.Dashboard', rest);
  for (const variable of templating.list) claim(`variable ${variable.name}`, 's.VariableModel', variable);
  for (const annotation of annotations.list) {
    const own = ['expr', 'step', 'titleFormat', 'textFormat', 'tagKeys', 'useValueForTime'];
    claim(`annotation ${annotation.name}`, 's.AnnotationQuery',
      Object.fromEntries(Object.entries(annotation).filter(([key]) => !own.includes(key))));
  }
  for (const panel of panels) {
    if (panel.type === 'row') claim(`row ${panel.title}`, 's.RowPanel', { ...panel, panels: [] });
    for (const one of panel.type === 'row' ? panel.panels : [panel]) claimPanel(one, claim, names, query);
  }
  return { text: lines.join('\n'), places };
}

function claimPanel(panel, claim, names, queried) {
  const { options, targets, fieldConfig, ...rest } = panel;
  const { custom, ...defaults } = fieldConfig.defaults;
  const types = names.get(panel.type);
  if (!types) throw new Error(`${panel.title}: panels of type ${panel.type} are not checked`);
  claim(panel.title, 's.Panel', { ...rest, fieldConfig: { defaults, overrides: fieldConfig.overrides } });
  claim(`${panel.title}, options`, `${types}.Options`, options);
  for (const { matcher, properties } of fieldConfig.overrides) {
    const own = properties.filter(({ id }) => id.startsWith('custom.')).map(({ id, value }) => [id.slice(7), value]);
    claim(`${panel.title}, override of ${matcher.options}`, `${types}.FieldConfig`, Object.fromEntries(own));
  }
  if (custom) claim(`${panel.title}, custom`, `${types}.FieldConfig`, custom);
  for (const { datasource, ...query } of queried ? targets : []) {
    claim(`${panel.title}, ${query.refId}`, 'prometheus.PrometheusDataQuery', query);
  }
}

function main([version, ...files]) {
  const schema = schemaFolder(version);
  const sources = new Map(files.map((file, place) => [path.join(__dirname, `board-${place}.ts`),
    { file, ...source(JSON.parse(fs.readFileSync(file)), schema) }]));
  const options = { strict: true, noEmit: true, skipLibCheck: true, target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.ESNext, moduleResolution: ts.ModuleResolutionKind.Bundler, types: [] };
  const host = ts.createCompilerHost(options);
  const { getSourceFile, fileExists, readFile } = host;
  host.fileExists = (name) => sources.has(name) || fileExists(name);
  host.readFile = (name) => sources.get(name)?.text ?? readFile(name);
  host.getSourceFile = (name, ...others) => (sources.has(name)
    ? ts.createSourceFile(name, sources.get(name).text, options.target) : getSourceFile(name, ...others));
  const program = ts.createProgram([...sources.keys()], options, host);
  const faults = ts.getPreEmitDiagnostics(program).filter(({ file }) => file && sources.has(file.fileName))
    .map((diagnostic) => {
      const { file, places } = sources.get(diagnostic.file.fileName);
      const { line } = diagnostic.file.getLineAndCharacterOfPosition(diagnostic.start);
      const where = places.filter((place) => place.line <= line).at(-1)?.where ?? 'imports';
      return { file, where, what: ts.flattenDiagnosticMessageText(diagnostic.messageText, ' ') };
    });
  process.stdout.write(JSON.stringify(faults));
}

main(process.argv.slice(2));
