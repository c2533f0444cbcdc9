"""The numeric kernels: what runs inside the compiled graph or right after it, each beside its float64 reference."""
