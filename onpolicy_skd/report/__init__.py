"""Files and lines about one run: metrics.jsonl, TensorBoard events, summary.json, report.md, plots, the console."""
