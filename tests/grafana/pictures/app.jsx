// A dashboard as a page. Frame, tile, bar gauge, table, curves, legend and theme are Grafana's components; the layout,
// the bar on top, heatmaps and state timelines are drawn here, because Grafana does not publish those.
import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';
import * as data from '@grafana/data';
import * as ui from '@grafana/ui';
import 'uplot/dist/uPlot.min.css';
import { initDefaultI18nInstance } from './node_modules/@grafana/i18n/dist/esm/i18n.mjs';
import { Source } from '../source.cjs';
import { wire } from '../prepare.cjs';
import { Heatmap, Lanes } from './canvas.jsx';
import { Curves } from './curves.jsx';

const UNIT = 30; // a row of Grafana's grid, and the gap between rows
const GAP = 8;
const WIDTH = 1600;

const job = JSON.parse(document.getElementById('job').textContent);
const source = new Source(job);
const grafana = wire(data, lastValueFrom, job.theme);
const { theme } = grafana;

async function load(panel) {
  const answered = [];
  for (const target of panel.targets ?? []) answered.push({ target, result: await source.target(panel, target) });
  if (!answered.some(({ result }) => result.length)) return [];
  return grafana.prepare(panel, answered, (what) => { throw new Error(what); });
}

function numbers(frames) {
  return frames.flatMap((frame) => frame.fields.filter((field) => field.type === 'number')
    .map((field) => ({ frame, field, name: data.getFieldDisplayName(field, frame, frames) })));
}

function last(field) {
  return data.reduceField({ field, reducers: ['lastNotNull'] }).lastNotNull;
}

function Nothing({ panel, width, height }) {
  const style = { width, height, display: 'grid', placeItems: 'center', textAlign: 'center', padding: 8,
    color: theme.colors.text.secondary };
  return <div style={style}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
}

function Tile({ panel, frames, width, height }) {
  const [found] = numbers(frames);
  const field = found?.field;
  const shown = field ? field.display(last(field)) : { text: panel.fieldConfig.defaults.noValue, numeric: NaN };
  return <ui.BigValue width={width} height={height} theme={theme} value={shown} colorMode={panel.options.colorMode}
    graphMode={panel.options.graphMode} justifyMode="auto" textMode="value" />;
}

function Bars({ panel, frames, width, height }) {
  const { options } = panel;
  const values = () => numbers(frames).map((one) => ({ ...one, shown: one.field.display(last(one.field)) }));
  const bar = ({ value, width: w, height: h }) => <ui.BarGauge width={w} height={h} theme={theme}
    value={{ ...value.shown, title: value.name }} field={value.field.config} display={value.field.display}
    orientation={options.orientation} displayMode={options.displayMode} valueDisplayMode={options.valueMode}
    showUnfilled={options.showUnfilled} namePlacement={options.namePlacement} text={options.text} itemSpacing={8} lcdCellWidth={12} />;
  return <ui.VizRepeater width={width} height={height} source={frames} getValues={values} renderValue={bar}
    renderCounter={0} orientation={options.orientation} itemSpacing={8} autoGrid={false}
    minVizHeight={options.minVizHeight} maxVizHeight={options.maxVizHeight} minVizWidth={options.minVizWidth} />;
}

function Drawing({ panel, frames, events, width, height }) {
  const size = { panel, frames, events, width, height, theme, data, from: job.from * 1000, to: job.to * 1000 };
  if (panel.type === 'stat') return <Tile {...size} />;
  if (!frames.length) return <Nothing {...size} />;
  if (panel.type === 'bargauge') return <Bars {...size} />;
  if (panel.type === 'table') return <ui.Table width={width} height={height} data={frames[0]} cellHeight="sm" />;
  if (panel.type === 'timeseries') return <Curves {...size} fields={numbers(frames)} />;
  if (panel.type === 'heatmap') return <Heatmap {...size} rows={numbers(frames)} />;
  if (panel.type === 'state-timeline') return <Lanes {...size} rows={numbers(frames)} />;
  throw new Error(`no drawing for ${panel.type}`);
}

function Panel({ panel, events }) {
  const [frames, setFrames] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    load(panel).then(setFrames, setError).finally(() => { window.done = (window.done ?? 0) + 1; });
  }, [panel]);
  if (error) console.error(`${panel.title}: ${error.stack}`);
  const { x, y, w, h } = panel.gridPos;
  const column = (WIDTH - 2 * GAP + GAP) / 24;
  const [width, height] = [w * column - GAP, h * (UNIT + GAP) - GAP];
  const style = { position: 'absolute', left: GAP + x * column, top: y * (UNIT + GAP), width, height };
  if (panel.type === 'row') {
    return <div style={{ ...style, font: '500 16px Inter', padding: 6 }}>{'▾'} {panel.title}</div>;
  }
  return <div style={style}>
    <ui.PanelChrome title={panel.title} description={panel.description} width={width} height={height} padding="md"
      statusMessage={error?.message}>
      {(w2, h2) => (frames ? <Drawing panel={panel} frames={frames} events={events} width={w2} height={h2} /> : null)}
    </ui.PanelChrome>
  </div>;
}

function Top({ board }) {
  const box = { border: `1px solid ${theme.colors.border.medium}`, borderRadius: 2, padding: '4px 8px', fontSize: 12 };
  const value = ({ name, includeAll }) => (includeAll ? 'All' : source.values[name]);
  return <div style={{ display: 'flex', gap: 8, alignItems: 'center', padding: '10px 8px' }}>
    <b style={{ fontSize: 16, marginRight: 8, whiteSpace: 'nowrap' }}>{board.title}</b>
    {board.templating.list.map((one) => <span key={one.name} style={box}>
      <span style={{ color: theme.colors.text.secondary }}>{one.label}</span> {value(one)}</span>)}
    <span style={{ flex: 1 }} />
    {board.links.map((one) => <span key={one.title} style={{ ...box, border: 'none', color: theme.colors.text.link }}>
      {one.title}{one.asDropdown ? ' ▾' : ''}</span>)}
  </div>;
}

// Rows one below the other, collapsed ones opened.
function opened(board) {
  let shift = 0;
  return board.panels.flatMap((panel) => {
    const moved = { ...panel, gridPos: { ...panel.gridPos, y: panel.gridPos.y + shift } };
    if (panel.type !== 'row' || !panel.collapsed) return [moved];
    const inner = panel.panels.map((one) => ({ ...one, gridPos: { ...one.gridPos, y: one.gridPos.y + shift } }));
    shift += Math.max(...panel.panels.map((one) => one.gridPos.y + one.gridPos.h)) - panel.gridPos.y - 1;
    return [moved, ...inner];
  });
}

async function main() {
  await initDefaultI18nInstance?.();
  const { board } = job;
  for (const variable of board.templating.list) await source.variable(variable);
  Object.assign(source.values, job.values);
  const events = [];
  for (const one of board.annotations.list.filter((annotation) => annotation.expr)) {
    events.push(...(await source.events(one)).map((text) => Number(text.split('@')[1])));
  }
  const panels = opened(board);
  const lines = Math.max(...panels.map((panel) => panel.gridPos.y + panel.gridPos.h));
  window.total = panels.length;
  const page = { width: WIDTH, background: theme.colors.background.canvas, color: theme.colors.text.primary };
  createRoot(document.getElementById('root')).render(<data.ThemeContext.Provider value={theme}>
    <ui.GlobalStyles /><div style={page}><Top board={board} />
      <div style={{ position: 'relative', height: lines * (UNIT + GAP) }}>
        {panels.map((panel) => <Panel key={panel.id} panel={panel} events={events} />)}
      </div></div></data.ThemeContext.Provider>);
}

main().catch((error) => { console.error(error.stack); window.total = 0; window.done = 0; });
