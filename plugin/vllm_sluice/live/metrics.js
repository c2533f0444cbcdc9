// What is shown of a layer: columns of the table; those with a unit are maps over time too.

import { count, plain, share } from "./dom.js";

export const HEADROOM = "quantization_headroom_ratio";
export const SNR = "quantization_snr_decibels";

// log: the scale spans decades; overview: among the maps that are shown together; low: small values are the bad ones; snug: the scale ends above the values, not at 1
export const COLUMNS = [
  { key: "activation_abs_max", name: "max |h|", log: true, unit: "scale of the hidden state, logarithmic",
    about: "Largest absolute value of the hidden state after each layer. Good: even rows; one that turns brighter is a growing massive activation." },
  { key: "activation_median", name: "median |h|" },
  { key: "activation_max_to_median_ratio", name: "max / median", log: true, overview: true, unit: "times the median |h|, logarithmic",
    about: "Largest |h| over the median of its layer. Good: even rows; from about 1,000 on it counts as massive and costs INT8 and FP8 their resolution." },
  { key: "activation_kurtosis", name: "kurtosis", log: true },
  { key: "activation_top_channel", name: "top channel", show: plain },
  { key: "attention_sink_mass", name: "sink mass", show: share, overview: true, unit: "share of attention on position 0",
    about: "Attention that sampled queries give to the first token, mean over heads. Good: even rows; 0.3 to 0.8 is usual without a gate, near 0 with one." },
  { key: "attention_sink_heads", name: "sink heads", show: count, of: "attention_heads" },
  { key: "attention_entropy_ratio", name: "entropy", show: share, unit: "entropy / log of the visible keys",
    about: "How evenly attention spreads: 1 is even, 0 is one single token. Good: even rows; a sudden fall to 0 is a collapse." },
  { key: "gate_mean", name: "gate mean", show: share, overview: true, snug: true, needs: "gate_mean", unit: "mean gate value",
    about: "Mean value of the gate: 0 shuts a head off, 1 lets it pass. Good: low but not 0 (published models: 0.1 to 0.2); near 1 the gate does nothing." },
  { key: "gate_closed_ratio", name: "gate closed", show: share, needs: "gate_mean" },
  { key: HEADROOM, name: "headroom", log: true, low: true, overview: true, needs: HEADROOM, unit: "the format's maximum / largest |value|, logarithmic",
    about: "What the format holds over the largest |value|, at the tightest site of the layer. Good: well above 1; below 1 it clips." },
];
export const MAPS = COLUMNS.filter((c) => c.unit);

const FORMATS = { serving: "as served", int8: "INT8", fp8_e4m3: "FP8 E4M3" };
const SCALES = { none: "no scale", static: "static scale", per_token: "scale per token", per_tensor: "scale per tensor" };
export const variantName = (variant) => {
  const [format, scale] = variant.split(":");
  return format === "serving" ? FORMATS.serving : `${FORMATS[format] ?? format}, ${SCALES[scale] ?? scale}`;
};
