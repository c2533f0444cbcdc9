// Grafana's path from an answer of Prometheus to the fields of a panel: frames, transformations, overrides. With
// @grafana/data as an argument, so that several versions, and a browser, can share it.
'use strict';

function wire(data, lastValueFrom, mode = 'dark') {
  const theme = data.createTheme({ colors: { mode } });
  const transformers = [...new Map(Object.values(data.standardTransformers).map((one) => [one.id, one])).values()];
  // Up to 12 the registry holds transformers, from 13 on functions that load them: give it both in one.
  data.standardTransformersRegistry.setInit(() => transformers.map((one) => ({
    ...one, transformation: Object.defineProperties(async () => one, Object.fromEntries(Object.keys(one).map(
      (key) => [key, { value: one[key], configurable: true }]))), tags: new Set(), categories: new Set(),
  })));
  const option = (id, custom) => ({ id: custom ? `custom.${id}` : id, path: id, name: id, isCustom: custom,
    process: (value) => value, shouldApply: () => true, settings: {}, getItemsCount: () => 0, override: () => null,
    editor: () => null });
  const standard = ['displayName', 'unit', 'min', 'max', 'decimals', 'noValue', 'color', 'thresholds', 'mappings',
    'links', 'filterable', 'fieldMinMax'];
  const registry = new data.Registry(() => [...standard.map((id) => option(id)), option('cellOptions', true), option('minWidth', true)]);
  data.standardFieldConfigEditorRegistry.setInit(() => standard.map((id) => option(id)));
  const units = new Set(data.getValueFormats().flatMap((category) => category.submenu.map((one) => one.value)));
  const known = new Set(transformers.map((one) => one.id));

  async function prepare(panel, answered, fail) {
    let frames = answered.flatMap(({ target, result }) => toFrames(data, target, result, answered.length > 1));
    for (const transformation of panel.transformations ?? []) {
      if (!known.has(transformation.id)) fail(`unknown transformation ${transformation.id}`);
    }
    if (panel.transformations?.length) {
      const organize = panel.transformations.find((one) => one.id === 'organize')?.options ?? {};
      const merged = new Set(frames.flatMap((frame) => frame.fields.map((field) => field.name)));
      for (const name of [...Object.keys(organize.indexByName ?? {}), ...Object.keys(organize.renameByName ?? {})]) {
        if (!merged.has(name)) fail(`organize names no field: ${name}`);
      }
      frames = await lastValueFrom(data.transformDataFrame(panel.transformations, frames, { interpolate: (v) => v }));
      const names = frames.flatMap((frame) => frame.fields.map((f) => data.getFieldDisplayName(f, frame, frames)));
      const sorted = panel.transformations.find((one) => one.id === 'sortBy')?.options.sort ?? [];
      for (const { field } of sorted) if (!names.includes(field)) fail(`sorted by no field: ${field}`);
    }
    for (const step of panel.fieldConfig.defaults.thresholds?.steps ?? []) {
      if (!/^#[0-9a-f]{3,8}$/i.test(theme.visualization.getColorByName(step.color))) fail(`no colour: ${step.color}`);
    }
    return data.applyFieldOverrides({ data: frames, fieldConfig: panel.fieldConfig, fieldConfigRegistry: registry,
      replaceVariables: (value) => value, theme, timeZone: 'utc' });
  }
  const knows = (unit) => units.has(unit) || /^(suffix|prefix):./.test(unit) || unit === 'string';
  return { data, theme, prepare, knows };
}

// What Grafana's Prometheus data source makes of an answer.
function toFrames(data, target, result, several) {
  const values = (series) => series.values ?? [series.value];
  if (target.format === 'table') {
    const rows = result.flatMap((series) => values(series).map(([time, value]) => ({ ...series, time, value })));
    const names = [...new Set(result.flatMap((series) => Object.keys(series.metric)))].sort();
    return [data.toDataFrame({ refId: target.refId, fields: [
      { name: 'Time', type: 'time', values: rows.map((row) => row.time * 1000) },
      ...names.map((name) => ({ name, type: 'string', values: rows.map((row) => row.metric[name] ?? '') })),
      { name: several ? `Value #${target.refId}` : 'Value', type: 'number', values: rows.map((row) => +row.value) },
    ] })];
  }
  return result.map((series) => {
    const legend = target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => series.metric[name] ?? '');
    return data.toDataFrame({ refId: target.refId, name: legend, fields: [
      { name: 'Time', type: 'time', values: values(series).map(([time]) => time * 1000) },
      { name: 'Value', type: 'number', labels: series.metric, config: { displayNameFromDS: legend },
        values: values(series).map(([, value]) => +value) },
    ] });
  });
}

module.exports = { wire };
