"""Random access to a teacher cache on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.storage.files import sha256
from onpolicy_skd.teacher.cache_format import (
    HEAD,
    INDEX,
    MANIFEST,
    CacheError,
    Manifest,
    Shard,
    _index_digest,
    unpack_bits,
)
from onpolicy_skd.types import Trajectory


class TeacherCache:
    """A complete cache, opened for reading.  The first read of a shard verifies its checksum.

    The constructor and all methods raise CacheError, naming the file, if one is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if not self.manifest.shards:
            raise CacheError(f"cache.path={folder}: its manifest lists no shards; build the cache again")
        self._open: dict[int, Any] = {}  # memory-mapped shards with a verified checksum
        digests, locations = [], []
        for number, shard in enumerate(self.manifest.shards):
            index = self._index(shard)
            digests.append(index["digests"].numpy().view("<u8"))
            positions, entries = (index[name].long() for name in ("positions", "entries"))
            starts = [size.cumsum(0) - size for size in (positions, entries)]
            number_S = torch.full_like(positions, number)
            locations.append(torch.stack([number_S, starts[0], positions, starts[1], entries], 1).numpy())
        unsorted = np.concatenate(digests)
        order = np.argsort(unsorted, kind="stable")
        # int64 [samples, 5]: shard, first position, positions, first entry, entries; sorted by digest.
        self._digests, self._locations = unsorted[order], np.concatenate(locations)[order]

    def holds(self, trajectory: Trajectory) -> bool:
        return self._find(trajectory) is not None

    def hidden(self, trajectory: Trajectory) -> Tensor:
        """Return hidden states ``[n, G]``."""
        file, first, count, *_ = self._sample(trajectory)
        return file.get_slice("hidden")[first : first + count]

    def classes(self, trajectory: Trajectory) -> SparseTargets:
        """Return the drawn classes, or the K largest probabilities, at each of the n positions."""
        file, first, count, first_entry, entries = self._sample(trajectory)
        layout = self.manifest.layout
        if layout.content == "top_k":
            k = layout.classes
            ids = self._bits(file, "ids", layout.id_bits, first * k, count * k)
            return SparseTargets(
                torch.from_numpy(ids).view(count, k), file.get_slice("probs")[first : first + count], "none"
            )
        ids = torch.from_numpy(self._bits(file, "ids", layout.id_bits, first_entry, entries))
        drawn = torch.from_numpy(self._bits(file, "counts", layout.count_bits, first_entry, entries))
        row = torch.div(drawn.cumsum(0) - 1, layout.classes, rounding_mode="floor")  # the counts of each row sum to U
        lengths = torch.bincount(row, minlength=count)
        slot = torch.arange(entries) - (lengths.cumsum(0) - lengths)[row]
        width = int(lengths.max())
        probs = torch.zeros(count, width).index_put((row, slot), (drawn.double() / layout.classes).float())
        first_ids = ids[lengths.cumsum(0) - lengths]  # unused slots repeat these
        return SparseTargets(first_ids[:, None].repeat(1, width).index_put((row, slot), ids), probs)

    def head(self) -> LMHead:
        """Return the teacher's LM head ``[V, G]``."""
        with _checked(self.folder, HEAD, str(self.manifest.head)) as file:
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 no container
            scale, cap = json.loads((file.metadata() or {}).get("logits", "[1.0, null]"))
            return LMHead(file.get_tensor("head"), bias, scale, cap)

    def _find(self, trajectory: Trajectory) -> np.ndarray | None:
        digest = np.frombuffer(trajectory.digest, "<u8")[0]
        at = int(np.searchsorted(self._digests, digest))
        if at == len(self._digests) or self._digests[at] != digest:
            return None
        return self._locations[at] if self._locations[at][2] == len(trajectory.target_ids) else None

    def _sample(self, trajectory: Trajectory) -> tuple[Any, int, int, int, int]:
        location = self._find(trajectory)
        if location is None:
            raise CacheError(f"cache.path={self.folder}: {trajectory.key} is not in the cache, which holds other texts")
        number, first, count, first_entry, entries = map(int, location)
        return self._shard(number), first, count, first_entry, entries

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            shard = self.manifest.shards[number]
            self._open[number] = _checked(self.folder, shard.file, shard.sha256)
        return self._open[number]

    def _index(self, shard: Shard) -> dict[str, Tensor]:
        path = self.folder / shard.file
        try:
            with safe_open(path, framework="pt") as file:
                index = {name: file.get_tensor(name) for name in INDEX}
            if _index_digest(index) == shard.index:
                return index
            reason = "its index differs from the manifest's"
        except Exception as error:  # a flipped byte in the header raises many kinds
            reason = f"{type(error).__name__}: {error}"
        raise CacheError(f"{path} is damaged or missing ({reason}); restore it or build the cache again")

    def _bits(self, file: Any, name: str, width: int, first: int, count: int) -> np.ndarray:
        start, stop = first * width, (first + count) * width
        data = file.get_slice(name)[start // 8 : math.ceil(stop / 8)].numpy()
        return unpack_bits(data, width, count, start % 8)


def verify(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the name of each file of a cache and its problem, None if it is good."""
    try:
        manifest = Manifest.read(folder)
    except CacheError as error:
        yield MANIFEST, str(error)
        return
    yield MANIFEST, None
    files = [(s.file, s.sha256) for s in manifest.shards] + ([(HEAD, manifest.head)] if manifest.head else [])
    for file, digest in files:
        try:
            _checked(folder, file, digest)
            yield file, None
        except CacheError as error:
            yield file, str(error)


def _checked(folder: Path, name: str, digest: str) -> Any:
    """Open a safetensors file after verifying its checksum.  Raises CacheError naming the file."""
    path = folder / name
    try:
        actual = sha256(path)
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror}); restore it or build the cache again") from None
    if actual != digest:
        raise CacheError(f"{path} is damaged (its SHA-256 differs); restore it or build the cache again")
    return safe_open(path, framework="pt")
