"""Evaluation: exact match on GSM8K-style answers, and performance measurements."""
