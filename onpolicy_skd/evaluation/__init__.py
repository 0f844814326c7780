"""Exact match, diagnostics of positions, statistics."""
