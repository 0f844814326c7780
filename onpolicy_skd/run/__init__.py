"""One run: checks before it starts, preparation, logging, supervision, health, stopping."""
