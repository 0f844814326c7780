"""Selection of the positions and samples to supervise: pure functions on tensors (docs/method.md, sections 4 and 5)."""
