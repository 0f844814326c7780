"""Benchmarks of the loss and of whole steps, each compared with its peer in the same run."""
