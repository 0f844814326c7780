"""A teacher cache in a teacher's place: the learner asks it as it would a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings, Settings
from onpolicy_skd.loss.sparse_targets import TRUNCATIONS, SparseTargets, concatenate
from onpolicy_skd.teacher.cache_format import CacheError
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.teacher.teacher import HiddenRowsTeacher, RowRequest, TeacherRows
from onpolicy_skd.types import Trajectory


class CachedHidden(HiddenRowsTeacher):
    """Exact: whatever a teacher can be asked follows from its hidden states."""

    def __init__(self, cache: TeacherCache, settings: Settings, device: str) -> None:
        super().__init__(cache.head().to(device), settings.alignment.temperature, settings.alignment.chunk_rows)
        self._cache = cache

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        for t in trajectories:
            yield t, self._cache.hidden(t).to(self._head.device)


class CachedClasses:
    """A few classes at each position, and nothing else, of the teacher."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache
        self._encoded: dict[str, tuple[bytes, SparseTargets, Tensor]] = {}

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        for t in trajectories:
            if t.key not in self._encoded or self._encoded[t.key][0] != t.digest:
                self._encoded[t.key] = (t.digest, self._cache.classes(t), torch.as_tensor(t.response_ids))

    def classes(self, wanted: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        """As a teacher's; ``seeds`` do not matter, the draws were made when the cache was."""
        parts, targets = [], []
        for key, at in wanted:
            _, known, own = self._encoded[key]
            index = torch.as_tensor(at, dtype=torch.long)
            parts.append(SparseTargets(known.ids_NC[index], known.probs_NC[index]))
            targets.append(own[index])
        found = concatenate(parts)
        if options.sampler == "rs_kd":
            return found
        fewer = SparseTargets(found.ids_NC[:, : options.k], found.probs_NC[:, : options.k])
        return TRUNCATIONS[options.sampler](fewer, torch.cat(targets), options)

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._encoded.pop(key, None)

    def head(self) -> Tensor:
        raise self._refusal("its LM head")

    def rows(self, wanted: RowRequest) -> Tensor:
        raise self._refusal("its hidden states")

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise self._refusal("its entropy and log-probabilities")

    def _refusal(self, what: str) -> CacheError:
        return CacheError(
            f"cache.path={self._cache.folder}: holds a few classes of the teacher at each position, not {what}; "
            "use a cache of hidden states (classes.sampler=none) or no cache"
        )


def open_teacher(settings: Settings, device: str) -> TeacherRows:
    """What stands in for the teacher of ``settings``, whose ``cache.path`` is set."""
    assert settings.cache.path is not None
    cache = TeacherCache(settings.cache.path)
    return CachedHidden(cache, settings, device) if settings.classes.sampler == "none" else CachedClasses(cache)
