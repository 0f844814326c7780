"""What a run leaves to read: metrics.jsonl, TensorBoard events, summary.json, report.md and a plot."""
