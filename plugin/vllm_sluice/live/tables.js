// What is best read as numbers: every layer now, token positions, quantization.

import { $, clamp, count, duration, explain, fill, finite, listed, make, number, put, share } from "./dom.js";
import { COLUMNS, HEADROOM, SNR, variantName } from "./metrics.js";

const header = (names) => make("tr", names.map((n) => make("th", n, { scope: "col" })));

// Length of a bar, 0 to 1: logarithmic where values span decades.
function length(v, values, log) {
  if (!log) return clamp(v, 0, 1);
  const low = Math.min(...finite(values)) / 2;
  return v > 0 ? Math.min(1, Math.log(v / low) / Math.log(Math.max(...finite(values)) / low)) : 0;
}

const percent = (part) => `${92 * part}%`; // of the cell
const bar = (part) => make("i", "", {}, { width: percent(part) });

export function renderLayers(past, variant) {
  if (explain($.tableBox, $.tableEmpty, !past.busy && past.whyEmpty())) return;
  const columns = COLUMNS.filter((c) => !c.needs || past.has(c.needs));
  $.baselineKey.hidden = !columns.some((c) => past.baseline(c.key).length);
  fill($.head, [header(["layer", ...columns.map((c) => c.name)])]);
  fill($.body, past.engine.order.map((index) => {
    const bad = past.latest("nonfinite_total")[index];
    const name = make("th", [past.layer(index), ...(bad > 0 ? [make("div", `${count(bad)} NaN/∞`, { class: "bad fine" })] : [])], { scope: "row" });
    return make("tr", [name, ...columns.map((c) => cell(past, c, index, variant))]);
  }));
}

function cell(past, column, index, variant) {
  const values = past.latest(column.key === HEADROOM ? `${HEADROOM}:${variant}` : column.key);
  const usual = past.baseline(column.key);
  const v = values[index];
  const whole = column.of && past.latest(column.of)[index];
  const scale = [...values, ...usual];
  const drawn = column.log || column.show === share || column.of;
  const part = drawn ? length(whole ? v / whole : v, scale, column.log) : 0;
  const text = (column.show ?? number)(v);
  const low = column.low && v < 1 ? { class: "warn" } : {};
  const mark = usual[index] == null ? [] : [make("b", "", { title: `baseline ${number(usual[index])}` }, { left: `calc(6px + ${percent(length(usual[index], scale, column.log))})` })];
  return make("td", [bar(v == null ? 0 : part), ...mark, make("span", whole ? `${text} / ${whole}` : text, low)]);
}

// Massive activations by the position of their token

const POSITIONS = [["start", "at position 0"], ["delimiter", "at a delimiter"], ["other", "at other tokens"]];

export function renderPositions(past) {
  const rows = Object.fromEntries(POSITIONS.map(([p]) => [p, past.engine?.increase?.rows[`massive_activations_total:${p}`] ?? []]));
  const tokens = ["prefill", "decode"].map((phase) => past.rise("tokens_observed_total", phase) ?? 0);
  const all = tokens[0] + tokens[1];
  const starts = past.rise("start_tokens_observed_total");
  const seconds = past.engine?.increase?.seconds ?? 0;
  const looked = `${count(all)} tokens looked at in ${duration(seconds)} (${count(tokens[0])} prefill, ${count(tokens[1])} decode${
    starts == null ? "" : `; ${count(starts)} of them at position 0`}).`;
  const known = POSITIONS.some(([p]) => rows[p].length);
  const layers = (past.engine?.order ?? []).filter((i) => POSITIONS.some(([p]) => rows[p][i] > 0));
  const why = !past.engine ? past.whyEmpty() : !known ? "The residual probe is not installed: nothing is known."
    : !all ? "No token was looked at in this span: nothing is known." : !layers.length && `No massive activation in this span. ${looked}`;
  if (explain($.positionBox, $.positionEmpty, why)) return;
  const without = past.engine.order.filter((i) => !layers.includes(i)).map((i) => past.layer(i));
  put($.positionNote, `${looked} Per 1,000 of them, in parentheses the number.${without.length ? ` None in layer ${listed(without, 12)}.` : ""}`);
  const rates = Object.fromEntries(POSITIONS.map(([p]) => [p, rows[p].map((n) => (n == null ? null : (1000 * n) / all))]));
  const most = Math.max(...POSITIONS.flatMap(([p]) => rates[p]));
  fill($.positionHead, [header(["layer", ...POSITIONS.map(([, words]) => words)])]);
  fill($.positionBody, layers.map((i) => make("tr", [make("th", past.layer(i), { scope: "row" }), ...POSITIONS.map(([p]) =>
    make("td", rows[p][i] > 0 ? [bar(rates[p][i] / most), make("span", [rates[p][i].toPrecision(3), make("small", ` (${count(rows[p][i])})`)])] : [bar(0), make("span", "0")], { class: p }))])));
}

// Quantization

export function renderQuantization(past) {
  $.quantization.hidden = !past.has(HEADROOM);
  if ($.quantization.hidden) return;
  const found = Object.keys(past.engine.latest).filter((key) => key.startsWith("quantization_")).map((key) => key.split(":").slice(1, 3).join(":"));
  const variants = [...new Set(found)].sort();
  if (explain($.quantizationBox, $.quantizationEmpty, !variants.length && past.whyEmpty())) return;
  fill($.quantizationHead, [header(["format", "lowest headroom", "lowest SNR"])]);
  fill($.quantizationBody, variants.map((variant) => make("tr", [make("th", variantName(variant), { scope: "row" }),
    worst(past, HEADROOM, variant, (v) => `${number(v)} ×`, 1), worst(past, SNR, variant, (v) => `${v.toFixed(1)} dB`, -Infinity)])));
  const clipped = Object.keys(past.engine.increase?.series.quantization_elements_total ?? {}).flatMap((site) => {
    const all = past.rise("quantization_elements_total", site);
    return all ? `${site.replaceAll("_", " ")} ${((100 * (past.rise("quantization_clipped_total", site) ?? 0)) / all).toPrecision(2)} %` : [];
  });
  put($.clipped, clipped.length ? `Beyond the baseline's static range in this span: ${clipped.join(", ")}.` : "");
}

function worst(past, metric, variant, text, limit) {
  const least = past.worst(metric, variant);
  return make("td", least ? [make("span", text(least.value), least.value < limit ? { class: "warn" } : {}), make("small", ` ${least.text}, ${least.site}`)] : "–");
}
