"""What a teacher cache was made from, and whether that is what a run trains on."""

from __future__ import annotations

import json
from typing import Any

from onpolicy_skd import models
from onpolicy_skd.command_line import flat
from onpolicy_skd.config import Settings
from onpolicy_skd.data.packed_text import tokenizer_digest
from onpolicy_skd.teacher_cache import CacheError, Layout, Manifest

TEMPLATE = {"template", "plain", "system", "instruction", "thinking"}
TEXTS: dict[str, Any] = {  # settings that say which texts there are
    "data": {
        *("source", "path", "name", "subset", "train_file", "train_split", "question_column", "answer_column"),
        *("train_problems", "text_column", "sequence_length", "documents", "tokens"),
    },
    "references": True,
    "rollout": {"max_tokens"},
    "samples": {"keep", "when", "metric", "prefilter_text"},
}


def made_from(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """What a teacher's outputs on a run's texts depend on; ``weights`` is None if the teacher's are not here."""
    template = settings.data.model_dump(mode="json", include=TEMPLATE) | {
        "chat_template": tokenizer.chat_template if settings.data.template == "chat" else None
    }
    try:
        weights = models.weights_digest(settings.teacher.model)
    except models.ModelError:
        weights = None
    return {
        "teacher": settings.teacher.model,
        "weights": weights,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": {} if settings.data.source == "text" else template,
        "texts": _texts(settings),
    }


def check(manifest: Manifest, settings: Settings, tokenizer: Any, student_classes: int) -> None:
    """Raises CacheError, naming all differences, for a cache of another teacher, tokenizer, template or sampler.

    Of a teacher whose weights are not here the name must do.
    """
    layout, then, now = manifest.layout, manifest.made_from, made_from(settings, tokenizer)
    wanted, found = Layout.of(settings, layout.vocabulary), []
    if not layout.serves(wanted):
        found += _differences(layout.described(), wanted.described())
    if student_classes < layout.vocabulary:
        found.append(f"vocabulary: {layout.vocabulary} then, {student_classes} now")
    other = then["weights"] != now["weights"] if now["weights"] else then["teacher"] != now["teacher"]
    if other:
        found.append(f"teacher: {then['teacher']} then, {now['teacher']} now, with other weights")
    if then["tokenizer"] != now["tokenizer"]:
        found.append("tokenizer: other tokens or ids than the student's now")
    found += [f"data.{text}" for text in _differences(then["template"], now["template"])]
    if found:
        raise CacheError(
            f"cache.path={settings.cache.path}: made for another run ({'; '.join(found)}); take its settings, which "
            "`python -m onpolicy_skd.cache info` shows, or build another cache"
        )


def differing(one: Manifest, other: Manifest) -> str:
    """How two plans of caches differ, in words."""
    found = _differences(one.layout.described(), other.layout.described())
    found += _differences(flat(one.made_from), flat(other.made_from))
    return "; ".join(found) or "other samples, or another cache.positions_per_shard"


def other_texts(manifest: Manifest, settings: Settings) -> str:
    """Why a text of the run may not be in the cache."""
    found = _differences(manifest.made_from["texts"], _texts(settings))
    return f"The cache was made of other texts ({'; '.join(found) or 'by the same settings, from other data'})"


def _texts(settings: Settings) -> dict[str, Any]:
    return flat(settings.model_dump(mode="json", include=TEXTS))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    return [f"{k}: {json.dumps(then.get(k))} then, {json.dumps(now.get(k))} now" for k in keys]
