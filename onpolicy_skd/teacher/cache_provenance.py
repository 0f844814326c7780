"""What a teacher cache was made from, and whether that is what a run trains on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from onpolicy_skd.config.loading import flat
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.packed_text import vocabulary_digest
from onpolicy_skd.models import loading as models
from onpolicy_skd.teacher.cache_format import CacheError, Layout, Manifest

TEMPLATE = {"chat": ("template", "system", "instruction", "thinking"), "plain": ("template", "plain", "instruction")}
TEXTS: dict[str, Any] = {  # settings that say which texts there are
    "run": {"seed"},
    "data": True,
    "student": {"model"},
    "references": True,
    "rollout": {"engine", "max_tokens", "top_p", "dtype"},
    "samples": True,
    "learner": {"compute_dtype"},
}


def provenance(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """What a teacher's outputs on a run's texts depend on; ``weights`` is None if the teacher's are not here."""
    data, template = settings.data, {}
    if data.source != "text":
        template = data.model_dump(mode="json", include=set(TEMPLATE[data.template]))
        if data.template == "chat":
            template["chat template"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
    try:
        weights = models.weights_digest(settings.teacher.model)
    except models.ModelError:
        weights = None
    drawn = settings.run.seed if settings.classes.sampler == "rs_kd" else None  # of the draws; nothing else is drawn
    return {
        "teacher": settings.teacher.model,
        "weights": weights,
        "tokenizer": vocabulary_digest(tokenizer),
        "template": template,
        "teacher.dtype": settings.teacher.dtype,
        "built": {"run.device": settings.run.device, "run.seed": drawn},
        "texts": _texts(settings),
    }


def check(manifest: Manifest, settings: Settings, tokenizer: Any, student_classes: int) -> None:
    """Raises CacheError, naming all differences, for a cache of another teacher, tokenizer, template or sampler.

    Of a teacher whose weights are not here the name must do.
    """
    layout, then, now = manifest.layout, manifest.provenance, provenance(settings, tokenizer)
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
    found += _differences(*({"teacher.dtype": side["teacher.dtype"]} for side in (then, now)))
    if found:
        raise CacheError(
            f"cache.path={settings.cache.path}: made for another run ({'; '.join(found)}); take its settings, which "
            "`skd cache info` shows, or build another cache"
        )


def same_outputs(one: Manifest, other: Manifest) -> bool:
    """Whether shards of the two may stand in one cache; which texts is told by ``plan``, not by settings."""
    sides = [m.provenance | {"texts": None} for m in (one, other)]
    return sides[0] == sides[1] and one.layout == other.layout and one.plan == other.plan


def differing(one: Manifest, other: Manifest) -> str:
    """How two plans of caches differ, in words."""
    found = _differences(one.layout.described(), other.layout.described())
    found += _differences(flat(one.provenance), flat(other.provenance))
    return "; ".join(found) or "other samples, or another cache.positions_per_shard"


def other_texts(manifest: Manifest, settings: Settings) -> str:
    """Why a text of the run may not be in the cache."""
    found = _differences(manifest.provenance["texts"], _texts(settings))
    why = "The cache was made of other texts; " + (
        f"of the settings that say which, these differ: {'; '.join(found)}" if found else "the data itself has changed"
    )
    if settings.samples.when == "prefilter":
        why += ". The scores by which the build kept its samples are in its run.dir: train with the same one"
    return why


def _texts(settings: Settings) -> dict[str, Any]:
    return flat(settings.model_dump(mode="json", include=TEXTS))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    return [f"{k}: {json.dumps(then.get(k))} then, {json.dumps(now.get(k))} now" for k in keys]
