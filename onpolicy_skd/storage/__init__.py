"""Durable files: the paths of a run folder, atomic writes, locks, checksums, checkpoints."""
