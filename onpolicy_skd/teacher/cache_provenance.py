"""Provenance of a teacher cache, and the check that it fits a run."""

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
TEXTS: dict[str, Any] = {  # settings that decide which texts are in the cache
    "run": {"seed"},
    "data": True,
    "student": {"model"},
    "teacher": {"prompt"},
    "references": True,
    "rollout": {"engine", "max_tokens", "top_p", "dtype"},
    "samples": True,
    "learner": {"compute_dtype"},
}


def provenance(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """Return everything that a teacher's outputs on a run's texts depend on; ``weights`` is None if not available."""
    data, template = settings.data, {}
    if data.source != "text":
        template = data.model_dump(mode="json", include=set(TEMPLATE[data.template]))
        if data.template == "chat":
            template["chat template"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
    try:
        weights = models.weights_digest(settings.teacher_model.model)
    except models.ModelError:
        weights = None
    seed = settings.run.seed if settings.classes.sampler == "rs_kd" else None  # only rs_kd draws
    quantization = settings.teacher.quantization
    return {
        "teacher": settings.teacher_model.model,
        "weights": weights,
        "tokenizer": vocabulary_digest(tokenizer),
        "template": template,
        "teacher.dtype": settings.teacher.dtype,
        **({"teacher.quantization": quantization} if quantization else {}),
        "built": {"run.device": settings.run.device, "run.seed": seed, "teacher.engine": settings.teacher.engine},
        "texts": _texts(settings),
    }


def check(manifest: Manifest, settings: Settings, tokenizer: Any, student_classes: int) -> None:
    """Raise CacheError, naming all differences, for a cache of another teacher, tokenizer, template or sampler.

    A teacher whose weights are not available is compared by name.
    """
    layout, then, now = manifest.layout, manifest.provenance, provenance(settings, tokenizer)
    required, problems = Layout.of(settings, layout.vocabulary), []
    if not layout.is_compatible_with(required):
        problems += _differences(layout.described(), required.described())
    if student_classes < layout.vocabulary:
        problems.append(f"vocabulary: {layout.vocabulary} then, {student_classes} now")
    other = then["weights"] != now["weights"] if now["weights"] else then["teacher"] != now["teacher"]
    if other:
        problems.append(f"teacher: {then['teacher']} then, {now['teacher']} now, with other weights")
    if then["tokenizer"] != now["tokenizer"]:
        problems.append("tokenizer: other tokens or ids than the student's now")
    problems += [f"data.{text}" for text in _differences(then["template"], now["template"])]
    precision = ("teacher.dtype", "teacher.quantization")
    problems += _differences(*({name: side.get(name) for name in precision} for side in (then, now)))
    if problems:
        raise CacheError(
            f"cache.path={settings.cache.path}: made for another run ({'; '.join(problems)}); take its settings, which "
            "`skd cache info` shows, or build another cache"
        )


def same_outputs(first: Manifest, second: Manifest) -> bool:
    """Return True if shards of both may be in one cache; ``plan``, not the settings, identifies the texts."""
    sides = [m.provenance | {"texts": None} for m in (first, second)]
    return sides[0] == sides[1] and first.layout == second.layout and first.plan == second.plan


def differing(first: Manifest, second: Manifest) -> str:
    """Return in words how two manifests differ."""
    differences = _differences(first.layout.described(), second.layout.described())
    differences += _differences(flat(first.provenance), flat(second.provenance))
    return "; ".join(differences) or "other samples, or shards of another size"


def other_texts(manifest: Manifest, settings: Settings) -> str:
    """Return the likely reason why a text of the run is not in the cache."""
    differences = "; ".join(_differences(manifest.provenance["texts"], _texts(settings)))
    reason = "The cache was made of other texts; " + (
        f"these settings, which choose the texts, differ: {differences}" if differences else "the data has changed"
    )
    if settings.samples.when == "prefilter":
        reason += ". The build kept samples by the scores in its run.dir: train with the same run.dir"
    return reason


def _texts(settings: Settings) -> dict[str, Any]:
    return flat(settings.model_dump(mode="json", include=TEXTS))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    return [f"{k}: {json.dumps(then.get(k))} then, {json.dumps(now.get(k))} now" for k in keys]
