"""Benchmarks of the loss and of whole steps, each compared with a baseline in the same run."""
