"""Measurements taken inside the forward pass: one file a kind, and the sliding window that combines them."""
