"""The frozen teacher, live or read from a cache on disk."""
