"""One run: preparation, logging, supervision, health, stopping."""
