"""Command lines for evaluation, benchmarks, fault injection and GPU checks."""
