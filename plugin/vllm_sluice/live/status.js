// What is wrong, in words; the header; the tiles.

import { $, clock, count, fill, last, listed, make, number, put, share } from "./dom.js";
import { HEADROOM, variantName } from "./metrics.js";

// Everything that an engineer should look into: [severity, text], the worst first.
function problems(past) {
  const found = [];
  const note = (severity, text) => found.push([severity, text]);
  if (past.lost) {
    const shown = past.points.times.length ? ` What is shown is from ${clock(last(past.points.times))}.` : "";
    note("bad", `No answer from the server since ${clock(past.lost.since)}: ${past.lost.why}. Trying again.${shown}`);
  }
  if (!past.engine) return found;
  const bad = past.nonfinite;
  const total = past.value("nonfinite_total");
  const rise = past.rise("nonfinite_total");
  if (total > 0) note(rise > 0 ? "bad" : "warn", `${count(total)} NaN or infinite values in layer ${listed(bad)}; ${rise > 0 ? `${count(rise)} of them in this span` : "none in this span"}.`);
  if (past.value("engine_paused") === 1) note("bad", "Generation is paused: by a switch under way, or by somebody else.");
  const ranks = past.labels("snapshot_age_seconds");
  const generation = (rank, kind) => past.value("generation", `${rank}:${kind}`) ?? null;
  const late = ranks.filter((r) => !(past.value("snapshot_age_seconds", r) <= past.answer.stale_after_seconds));
  if (late.length) note("bad", `No fresh snapshot from ${listed(late)}: what is shown of them is old.`);
  const behind = ranks.filter((r) => generation(r, "desired") !== generation(r, "applied"));
  if (behind.length) note("bad", `Not in the state that was asked for: ${listed(behind)}.`);
  const failed = past.labels("probe_errors_total").filter((p) => past.value("probe_errors_total", p) > 0);
  for (const p of failed) note("warn", `The ${p} probe failed ${count(past.value("probe_errors_total", p))} times; its numbers may be missing. See the server log.`);
  if (past.value("config_file_good") === 0) note("warn", "The configuration file cannot be used; the last good state stays. See the server log.");
  const waiting = past.value("config_restart_needed");
  if (waiting > 0) note("info", `${count(waiting)} changed settings wait for a restart.`);
  return found;
}

const RANKING = ["bad", "warn", "info"];

export function renderStatus(past) {
  const found = problems(past).sort((a, b) => RANKING.indexOf(a[0]) - RANKING.indexOf(b[0]));
  const calm = !past.engine ? past.whyEmpty()
    : "No problem seen: nothing non-finite, generation not paused, snapshots fresh, no probe errors.";
  $.status.className = found[0]?.[0] ?? (past.engine ? "good" : "info");
  fill($.status, found.length ? found.map(([severity, text]) => make("p", [make("b", { bad: "Problem: ", warn: "Warning: ", info: "Note: " }[severity]), text])) : [make("p", calm)]);
}

export function renderHeader(past, paused) {
  const [state, word, detail] = paused && !past.lost ? ["paused", "paused", "the page does not refresh"] : past.health();
  $.state.className = state;
  put($.state, word);
  put($.age, past.answer || past.lost ? detail : "");
  if (!past.engine) return;
  const { names, models = {} } = past.answer;
  put($.model, past.engine.model_name);
  document.title = `${past.engine.model_name} · Sluice`;
  const { version, vllm_version, fingerprint, baseline } = past.engine.info;
  const ranks = past.labels("snapshot_age_seconds").length;
  put($.versions, `Sluice ${version} · vLLM ${vllm_version} · fingerprint ${fingerprint} · ${past.engine.layers.length} layers · ranks: ${ranks}${baseline ? ` · baseline ${baseline}` : ""}`);
  fill($.engine, names.map((n) => make("option", models[n] ? `${n} · ${models[n]}` : n, { value: n })));
  $.engine.value = past.engine.engine;
  $.engines.hidden = names.length < 2;
}

function tile(past, title, content, subs, kind = "") {
  const none = content == null;
  return make("div", [make("h3", title), make("p", none ? (past.busy ? "not measured" : "no traffic") : content, { class: none ? "words" : `value ${kind}` }),
    ...(none ? ["in the window"] : subs).filter(Boolean).map((s) => make("p", s, { class: "sub" }))], { class: "tile" });
}

function patchTile(past, patch) {
  const title = `Patch ${patch}`;
  if (!past.value("patch_installed", patch)) return tile(past, title, "not installed", ["the model runs as released"], "words");
  const on = past.value("patch_enabled", patch);
  const change = past.value("patch_last_change_timestamp_seconds", patch);
  return tile(past, title, on ? "on" : "off", [change ? `since ${clock(change)}` : "not switched yet"], on ? "good" : "");
}

function mean(values) {
  const known = values.filter((v) => v != null);
  return known.length ? known.reduce((a, b) => a + b) / known.length : null;
}

function headroomTile(past, variant) {
  const least = past.worst(HEADROOM, variant);
  return tile(past, "Headroom", least && `${number(least.value)} ×`, least && [`${least.text}, ${least.site}`, variantName(variant)], least?.value < 1 ? "warn" : "");
}

export function renderTiles(past, variant) {
  if (!past.engine) return fill($.tiles, [tile(past, "Snapshots", "no data", [past.whyEmpty()], "words")]);
  const peak = past.extreme(past.latest("activation_abs_max"));
  const sink = past.extreme(past.latest("attention_sink_mass"));
  const usual = (metric, at, text) => at && past.baseline(metric)[at.index] != null && `baseline there ${text(past.baseline(metric)[at.index])}`;
  const gate = mean(past.latest("gate_mean"));
  const massive = past.labels("massive_activations_total").map((p) => [past.value("massive_activations_total", p), p]).filter(([n]) => n > 0);
  const bad = past.nonfinite;
  const patches = past.labels("patch_installed");
  fill($.tiles, [
    ...(patches.length ? patches : ["gate"]).map((p) => patchTile(past, p)),
    tile(past, "Strongest sink", sink && share(sink.value), sink && [
      `${sink.text} · ${count(past.latest("attention_sink_heads")[sink.index])} of ${count(past.latest("attention_heads")[sink.index])} heads`, usual("attention_sink_mass", sink, share)]),
    tile(past, "Largest |h|", peak && number(peak.value), peak && [
      `${peak.text} · ${number(past.latest("activation_max_to_median_ratio")[peak.index])} × median`, usual("activation_abs_max", peak, number),
      massive.length && `massive: ${massive.map(([n, position]) => `${count(n)} ${position}`).join(", ")}`], peak?.value === Infinity ? "bad" : ""),
    ...(past.has("gate_mean") ? [tile(past, "Mean gate", gate && share(gate), ["mean over layers", `${share(mean(past.latest("gate_closed_ratio")))} of gates closed`])] : []),
    ...(past.has(HEADROOM) ? [headroomTile(past, variant)] : []),
    tile(past, "Non-finite", count(past.value("nonfinite_total")), [bad.length ? `in layer ${listed(bad)}` : "since the start"], bad.length ? "bad" : ""),
    tile(past, "Tokens seen", ["prefill", "decode"].map((p) => make("span", [count(past.value("tokens_observed_total", p)), make("small", ` ${p}`)])), []),
  ]);
}
