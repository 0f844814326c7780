"""The error for bad input."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or combination that cannot be used; the message says what would be accepted."""
