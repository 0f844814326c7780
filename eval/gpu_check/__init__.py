"""Checks of the GPU path in ten minutes: machine, mathematics, engine, runs; each check has a pass criterion."""
