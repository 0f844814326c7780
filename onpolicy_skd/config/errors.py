"""The error for bad input."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or combination that cannot be used; the message says what would be accepted."""


def first_line(error: object) -> str:
    """Return the first line of the message of ``error``; many libraries add pages of advice below it."""
    return (str(error).splitlines() or [""])[0]
