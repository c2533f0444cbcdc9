"""Run-time state: what may change while the server runs, and how it changes on all ranks at once."""
