"""Teachers that answer from a cache, with the interface of a live teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings, Settings
from onpolicy_skd.loss.sparse_targets import TRUNCATIONS, SparseTargets, concatenate
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.teacher.cache_format import CacheError
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.teacher.teacher import HiddenRowsTeacher, RowRequest, TeacherRows
from onpolicy_skd.types import Trajectory


class CachedHidden(HiddenRowsTeacher):
    """A teacher from cached hidden states, which determine all answers exactly."""

    def __init__(self, cache: TeacherCache, settings: Settings, device: str) -> None:
        super().__init__(cache.head().to(device), settings.alignment.temperature, settings.alignment.chunk_rows)
        self._cache = cache

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        for t in trajectories:
            yield t, self._cache.hidden(t).to(self._head.device)


class CachedClasses:
    """A teacher from a cache that holds only a few classes at each position; other questions raise CacheError."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache
        self._encoded: dict[str, tuple[bytes, SparseTargets, Tensor]] = {}

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        for t in trajectories:
            if t.key not in self._encoded or self._encoded[t.key][0] != t.digest:
                self._encoded[t.key] = (t.digest, self._cache.classes(t), torch.as_tensor(t.target_ids))

    def classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        """Return the cached classes; ignore ``seeds``, because classes were drawn when the cache was built."""
        requested, targets = [], []
        for key, at in request:
            _, cached, target_ids = self._encoded[key]
            index = torch.as_tensor(at, dtype=torch.long)
            requested.append(SparseTargets(cached.ids_NC[index], cached.probs_NC[index]))
            targets.append(target_ids[index])
        sparse = concatenate(requested)
        if options.sampler == "rs_kd":
            return sparse
        fewer = SparseTargets(sparse.ids_NC[:, : options.k], sparse.probs_NC[:, : options.k])
        return TRUNCATIONS[options.sampler](fewer, torch.cat(targets), options)

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._encoded.pop(key, None)

    def head(self) -> LMHead:
        raise self._refusal("its LM head")

    def rows(self, request: RowRequest) -> Tensor:
        raise self._refusal("its hidden states")

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise self._refusal("its entropy and log-probabilities")

    def _refusal(self, what: str) -> CacheError:
        return CacheError(
            f"cache.path={self._cache.folder}: holds a few classes of the teacher at each position, not {what}; "
            "use a cache of hidden states (classes.sampler=none) or no cache"
        )


def open_teacher(settings: Settings, device: str) -> TeacherRows:
    """Return the teacher that answers from the cache at ``cache.path``, which must be set."""
    assert settings.cache.path is not None
    cache = TeacherCache(settings.cache.path)
    return CachedHidden(cache, settings, device) if settings.classes.sampler == "none" else CachedClasses(cache)
