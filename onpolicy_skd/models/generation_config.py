"""Generation settings of a checkpoint, made savable."""

from __future__ import annotations

from typing import Any


def savable_generation_config(config: Any) -> Any:
    """Return the generation ``config`` without the values that transformers refuses to save.

    transformers loads a checkpoint whose values contradict each other, such as ``do_sample=false`` with a temperature,
    but refuses to save it.
    """
    from transformers import GenerationConfig

    if _is_valid(config):
        return config
    kept: dict[str, Any] = {}
    values = config.to_diff_dict()
    for key in sorted(values, key=lambda k: (k != "do_sample", k)):  # do_sample decides what else is valid
        if _is_valid(GenerationConfig(**kept, **{key: values[key]})):
            kept[key] = values[key]
    return GenerationConfig(**kept)


def _is_valid(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True
