"""Fault injection: what happens to runs whose processes, disks and files fail.  See docs/reliability.md."""
