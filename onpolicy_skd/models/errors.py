"""The error of models and tokenizers that cannot be used."""

from __future__ import annotations

from onpolicy_skd.config.errors import ConfigError


class ModelError(ConfigError):
    """A model or tokenizer that cannot be used; the message names it and says what is accepted."""
