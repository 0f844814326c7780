"""Prompts, reference answers and packed text; the demo task and its bundled pair of models."""
