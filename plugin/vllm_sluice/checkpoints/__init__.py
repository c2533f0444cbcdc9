"""Reading gate weights from a checkpoint or from a sidecar file."""
