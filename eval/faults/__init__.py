"""Fault injection: outcomes of runs whose processes, disks or files fail.  See docs/reliability.md."""
