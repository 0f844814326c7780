"""Comparison runs: the grid, results, page, figures."""
