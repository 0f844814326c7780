"""The GPU path, checked in ten minutes: machine, mathematics, engine, runs; each check has a pass criterion."""
