"""Removal of credentials from settings that leave the machine, for trackers and model cards."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
SHORTEST = 8  # fewest characters of an environment variable that counts as a credential
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), MASK),  # user and password of a URL
    (re.compile(r"(?i)([?&][^=&\s]*(?:token|secret|key|password|signature|sig)[^=&\s]*=)[^&\s]+"), rf"\1{MASK}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),  # tokens of the Hugging Face hub
)


def redact(text: str) -> str:
    """Return ``text`` with credentials replaced by ``***``.

    These are the user part of URLs, query parameters named like a secret, tokens of the Hugging Face hub, and the
    values of environment variables named like a secret.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAME.search(name):
            text = text.replace(value, MASK)
    for pattern, mask in PATTERNS:
        text = pattern.sub(mask, text)
    return text


def redact_tree(tree: Any) -> Any:
    """Return nested mappings and lists with ``redact`` applied to every text in them."""
    if isinstance(tree, dict):
        return {key: redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree
