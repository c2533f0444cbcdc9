// Curves with Grafana's own chart and legend; the wiring, which Grafana's panel does in its core, is ours.
import { useMemo } from 'react';
import * as ui from '@grafana/ui';

const LEGEND = 24;

// One time axis for all curves.
function joined(fields) {
  const times = [...new Set(fields.flatMap(({ frame }) => Array.from(frame.fields[0].values)))].sort((a, b) => a - b);
  const places = new Map(times.map((time, place) => [time, place]));
  const rows = fields.map(({ frame, field }) => {
    const row = new Array(times.length).fill(null);
    Array.from(frame.fields[0].values).forEach((time, i) => {
      row[places.get(time)] = Number.isFinite(field.values[i]) ? field.values[i] : null;
    });
    return row;
  });
  return [times, ...rows];
}

function stacked([times, ...rows]) {
  const sum = new Array(times.length).fill(0);
  const sums = rows.map((row) => row.map((value, i) => { sum[i] += value ?? 0; return sum[i]; }));
  return [times, ...sums];
}

function configure({ panel, fields, theme, from, to, events }) {
  const { custom, min, max, thresholds } = panel.fieldConfig.defaults;
  const log = custom.scaleDistribution.type === 'log';
  const builder = new ui.UPlotConfigBuilder('utc');
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: 0, direction: 1, range: () => [from, to] });
  builder.addScale({ scaleKey: 'y', orientation: 1, direction: 1, min, max,
    distribution: log ? 'log' : 'linear', log: 10 });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: 'bottom', theme, timeZone: 'utc', grid: { show: true } });
  const { display } = fields[0].field;
  builder.addAxis({ scaleKey: 'y', placement: 'left', theme, grid: { show: true },
    formatValue: (value) => { const { text, suffix } = display(value); return `${text}${suffix ?? ''}`; } });
  for (const { field } of fields) {
    const colour = field.display(0).color;
    builder.addSeries({ scaleKey: 'y', theme, drawStyle: 'line', lineColor: colour, lineWidth: custom.lineWidth,
      fillOpacity: custom.fillOpacity, showPoints: 'never', pxAlign: false, spanNulls: false, pointSize: 5,
      colorMode: undefined, softMin: undefined });
  }
  builder.addHook('draw', (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.setLineDash([6, 4]);
    ctx.lineWidth = 1;
    for (const { value, color } of thresholds && custom.thresholdsStyle ? thresholds.steps : []) {
      const y = value == null ? -1 : plot.valToPos(value, 'y', true);
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      line(ctx, theme.visualization.getColorByName(color), bbox.left, y, bbox.left + bbox.width, y);
    }
    for (const time of events.filter((one) => one >= from && one <= to)) {
      const x = plot.valToPos(time, 'x', true);
      line(ctx, '#a352cc', x, bbox.top, x, bbox.top + bbox.height);
    }
    ctx.restore();
  });
  return builder;
}

function line(context, colour, x0, y0, x1, y1) {
  context.strokeStyle = colour;
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

export function Curves(props) {
  const { panel, fields, width, height, data } = props;
  const builder = useMemo(() => configure(props), [fields, width, height]);
  const series = joined(fields);
  const drawn = panel.fieldConfig.defaults.custom.stacking.mode === 'normal' ? stacked(series) : series;
  const items = fields.map(({ field, name }) => {
    const value = data.reduceField({ field, reducers: ['lastNotNull'] }).lastNotNull;
    return { label: name, color: field.display(0).color, yAxis: 1,
      getDisplayValues: () => [{ ...field.display(value), title: 'Last' }] };
  });
  const wide = fields.reduce((sum, { name }) => sum + 110 + 7 * name.length, 0);
  const lines = Math.min(3, Math.ceil(wide / width));
  return <div style={{ width, height }}>
    <ui.UPlotChart config={builder} data={drawn} width={width} height={height - lines * LEGEND} />
    <div style={{ height: lines * LEGEND, overflow: 'hidden' }}>
      <ui.VizLegend items={items} displayMode="list" placement="bottom" />
    </div>
  </div>;
}
