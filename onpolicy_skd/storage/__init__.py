"""Durable files: atomic writes, checksums, checkpoints, the paths of a run folder."""
