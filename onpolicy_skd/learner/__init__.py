"""The learner: forward, scoring, objective, optimizer step, state."""
