// Our own drawing of Grafana's heatmap and state timeline, from fields that Grafana's code has prepared.
import { useEffect, useRef } from 'react';
import * as chromatic from 'd3-scale-chromatic';

const DIVERGING = new Set(['RdBu', 'Spectral']);
const AXIS = 22;
const SCALE = 34;

// As Grafana's heatmap does it: diverging schemes are always turned around, sequential ones in the light theme.
function palette({ scheme, steps, reverse }, theme) {
  const colours = Array.from({ length: steps }, (_, i) => chromatic[`interpolate${scheme}`](i / (steps - 1)));
  return reverse || DIVERGING.has(scheme) || theme.isLight ? colours.reverse() : colours;
}

function useCanvas(width, height, draw, inputs) {
  const canvas = useRef();
  useEffect(() => {
    canvas.current.width = width;
    canvas.current.height = height;
    const context = canvas.current.getContext('2d');
    context.font = '12px Inter, Roboto, "DejaVu Sans", sans-serif';
    draw(context);
  }, inputs);
  return <canvas ref={canvas} style={{ width, height, display: 'block' }} />;
}

function timeAxis(context, { from, to, theme }, left, right, bottom) {
  const minutes = [1, 2, 5, 10, 15, 30, 60].find((step) => (to - from) / 60000 / step <= (right - left) / 80);
  context.fillStyle = theme.colors.text.primary;
  context.textAlign = 'center';
  for (let time = Math.ceil(from / minutes / 60000) * minutes * 60000; time <= to; time += minutes * 60000) {
    const x = left + (right - left) * (time - from) / (to - from);
    if (x > left + 16 && x < right - 16) context.fillText(new Date(time).toISOString().slice(11, 16), x, bottom + 15);
  }
  context.textAlign = 'left';
}

function marks(context, { events, from, to }, left, right, bottom) {
  context.strokeStyle = '#a352cc';
  context.setLineDash([4, 3]);
  for (const time of events.filter((one) => one >= from && one <= to)) {
    const x = left + (right - left) * (time - from) / (to - from);
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, bottom);
    context.stroke();
  }
  context.setLineDash([]);
}

// Values of a field with the times from which and until which they hold.
function spans({ frame, field }) {
  const times = Array.from(frame.fields.find((one) => one.type === 'time').values);
  const steps = times.slice(1).map((time, i) => time - times[i]);
  const step = steps.length ? Math.min(...steps) : 60000;
  return times.map((time, i) => ({ from: time, to: time + step, value: field.values[i] }))
    .filter(({ value }) => value != null && Number.isFinite(value));
}

export function Heatmap(props) {
  const { panel, rows, width, height, theme, data, from, to } = props;
  const { color, cellValues } = panel.options;
  const draw = (context) => {
    const lines = rows.map((row) => ({ ...row, spans: spans(row) }));
    const values = lines.flatMap((row) => row.spans.map(({ value }) => value));
    const low = color.min ?? Math.min(...values);
    const high = color.max ?? Math.max(...values);
    const colours = palette(color, theme);
    const [left, right, bottom] = [40, width - 4, height - AXIS - SCALE];
    const tall = bottom / lines.length;
    const x = (time) => left + (right - left) * (Math.min(Math.max(time, from), to) - from) / (to - from);
    lines.forEach((row, place) => {
      const top = bottom - (place + 1) * tall;
      const [y0, y1] = [place + 1, place].map((edge) => Math.round(bottom - edge * tall)); // whole pixels: no seams
      for (const span of row.spans) {
        const share = (span.value - low) / (high - low || 1);
        context.fillStyle = colours[Math.min(colours.length - 1, Math.max(0, Math.round(share * (colours.length - 1))))];
        const [x0, x1] = [Math.round(x(span.from)), Math.round(x(span.to))];
        context.fillRect(x0, y0, x1 - x0, y1 - y0);
      }
      context.fillStyle = theme.colors.text.primary;
      if (place % Math.ceil(14 / tall) === 0) context.fillText(row.name, 6, top + tall / 2 + 4);
    });
    timeAxis(context, props, left, right, bottom);
    marks(context, props, left, right, bottom);
    scale(context, colours, low, high, data.getValueFormat(cellValues.unit));
  };
  const scale = (context, colours, low, high, format) => {
    const [wide, top] = [Math.min(340, width - 60), height - 26];
    colours.forEach((colour, i) => {
      context.fillStyle = colour;
      context.fillRect(40 + wide * i / colours.length, top, wide / colours.length + 0.6, 9);
    });
    context.fillStyle = theme.colors.text.primary;
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      context.textAlign = share === 0 ? 'left' : share === 1 ? 'right' : 'center';
      const { text, suffix } = format(low + share * (high - low), cellValues.decimals);
      context.fillText(`${text}${suffix ?? ''}`, 40 + wide * share, top + 23);
    }
    context.textAlign = 'left';
  };
  return useCanvas(width, height, draw, [rows, width, height]);
}

export function Lanes(props) {
  const { rows, width, height, theme, from, to } = props;
  const draw = (context) => {
    const names = rows.map((row) => context.measureText(row.name).width);
    const [left, right, bottom] = [Math.min(width * 0.4, Math.max(...names) + 14), width - 4, height - AXIS];
    const tall = bottom / rows.length;
    const x = (time) => left + (right - left) * (Math.min(Math.max(time, from), to) - from) / (to - from);
    rows.forEach((row, place) => {
      const top = place * tall + tall * 0.1;
      for (const span of merged(spans(row))) {
        const shown = row.field.display(span.value);
        const [x0, x1] = [x(span.from), x(span.to)];
        context.fillStyle = shown.color;
        context.globalAlpha = 0.8;
        context.fillRect(x0, top, Math.max(1, x1 - x0), tall * 0.8);
        context.globalAlpha = 1;
        context.fillStyle = '#fff';
        if (tall > 16 && context.measureText(shown.text).width + 8 < x1 - x0) {
          context.fillText(shown.text, x0 + 4, top + tall * 0.4 + 4);
        }
      }
      context.fillStyle = theme.colors.text.primary;
      context.textAlign = 'right';
      if (tall > 11 || place % 2 === 0) context.fillText(row.name, left - 6, top + tall * 0.4 + 4);
      context.textAlign = 'left';
    });
    timeAxis(context, props, left, right, bottom);
    marks(context, props, left, right, bottom);
  };
  return useCanvas(width, height, draw, [rows, width, height]);
}

function merged(list) {
  const out = [];
  for (const span of list) {
    const before = out.at(-1);
    if (before && before.value === span.value && span.from - before.to < 1) before.to = span.to;
    else out.push({ ...span });
  }
  return out;
}
