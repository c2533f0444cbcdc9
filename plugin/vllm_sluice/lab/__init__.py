"""The lab: train gated and ungated twins, measure them as the papers do, and export them for serving."""
