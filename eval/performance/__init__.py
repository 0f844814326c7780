"""Benchmarks: what the pieces cost, side by side with their peers in one run."""
