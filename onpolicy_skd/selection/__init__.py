"""Which positions and samples are supervised: pure functions on tensors (docs/method.md, sections 4 and 5)."""
