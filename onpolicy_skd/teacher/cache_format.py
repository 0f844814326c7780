"""Files of a teacher cache: teacher actors write it once, a run reads it in place of a teacher (docs/off_policy.md).

A cache is a folder of safetensors shards, which are memory-mapped, and ``manifest.json``.  The class sampler of the
settings decides what a shard holds for each eligible position:

    hidden   (none)           the last hidden state, in the teacher's type; the LM head has a separate file: exact
    rs_kd    (rs_kd)          the drawn ids, ceil(log2 V) bits each, and their counts, ceil(log2(U + 1)) bits each.  The
                              counts of a position sum to U, which shows where the next one starts, so no lengths
    top_k    (a truncation)   the K largest probabilities, float32, and their ids, from which every truncation follows

and, for each sample, eight bytes that identify its tokens (``Trajectory.digest``) and its sizes.  Samples are looked up
by content, so neither their order nor the keys that a run gives them matter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.storage.files import digest_of, replacing, sha256, sync, write_text
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import Trajectory, seed_of

FORMAT = 1
MANIFEST, PLAN, HEAD, LOCK = "manifest.json", "building.json", "head.safetensors", ".lock"
INDEX = ("digests", "positions", "entries")  # tensors of a shard that locate its samples
POSITIONS_PER_SHARD = 65_536  # in a new cache
PACKED_AT_ONCE = 65_536  # values; a multiple of 8, so that each packed block fills its last byte
Content = Literal["hidden", "rs_kd", "top_k"]


class CacheError(ConfigError):
    """A cache that is damaged, incomplete, or made for another run; the message names the file or the difference."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Content of a cache for each position."""

    content: Content
    vocabulary: int  # V
    classes: int  # U draws or K classes per position; 0 for hidden states
    temperature: float | None  # of the distributions; None for hidden states

    @staticmethod
    def of(settings: Settings, vocabulary: int) -> Layout:
        cfg, temperature = settings.classes, settings.alignment.temperature
        if cfg.sampler == "none":
            return Layout("hidden", vocabulary, 0, None)
        if cfg.sampler == "rs_kd":
            return Layout("rs_kd", vocabulary, cfg.draws, temperature)
        return Layout("top_k", vocabulary, min(cfg.k, vocabulary), temperature)

    @property
    def id_bits(self) -> int:
        return (self.vocabulary - 1).bit_length()

    @property
    def count_bits(self) -> int:
        return self.classes.bit_length()  # for counts from 0 to U

    def described(self) -> dict[str, Any]:
        """Return the layout as content and the settings that determine it."""
        count = {"hidden": {}, "rs_kd": {"classes.draws": self.classes}, "top_k": {"classes.k": self.classes}}
        return {"content": self.content, "alignment.temperature": self.temperature, **count[self.content]}

    def is_compatible_with(self, required: Layout) -> bool:
        """Return True if a cache of this layout holds all that one of layout ``required`` would."""
        same = replace(self, classes=0) == replace(required, classes=0)
        larger = self.content == "top_k" and self.classes > required.classes
        return same and (self.classes == required.classes or larger)


@dataclass(frozen=True, slots=True)
class Shard:
    """Manifest entry of one shard."""

    file: str
    sha256: str
    index: str  # digest of its INDEX tensors, which are read when a cache is opened
    samples: int
    positions: int
    entries: int  # (id, count) pairs of rs_kd
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    provenance: dict[str, Any]  # teacher, tokenizer, template, data: see ``cache_provenance.provenance``
    layout: Layout
    plan: str  # digest of all samples, in their order, and of the cut into shards
    head: str | None = None  # SHA-256 of the LM head's file, with hidden states
    shards: list[Shard] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.shards)

    @property
    def positions(self) -> int:
        return sum(s.positions for s in self.shards)

    @property
    def information_bits(self) -> float:
        """Bits of the records alone; rs_kd: ids, counts and a length per position; top_k: ids and floats."""
        layout, entries = self.layout, sum(s.entries for s in self.shards)
        if layout.content == "hidden":
            return 8.0 * sum(s.bytes for s in self.shards)
        if layout.content == "rs_kd":
            return entries * (layout.id_bits + layout.count_bits) + self.positions * layout.count_bits
        return self.positions * layout.classes * (layout.id_bits + 32)

    def write(self, folder: Path, name: str = MANIFEST) -> None:
        record = {"format": FORMAT, **asdict(self)}
        write_text(folder / name, json.dumps(record | {"digest": digest_of(record)}, indent=1))

    @staticmethod
    def read(folder: Path, name: str = MANIFEST) -> Manifest:
        """Read a manifest.  Raises CacheError if it is missing, damaged, or of another format."""
        path = folder / name
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("digest") != digest_of(record):
                raise CacheError(f"{path} is damaged (its digest differs); restore it or build the cache again")
            if record.pop("format") != FORMAT:
                raise CacheError(f"{path}: this version reads format {FORMAT}")
            layout, shards = Layout(**record.pop("layout")), [Shard(**s) for s in record.pop("shards")]
            return Manifest(layout=layout, shards=shards, **record)
        except FileNotFoundError:
            building = (folder / PLAN).exists()
            why = "is not complete: the same build continues it" if building else f"has no {name}, so it is no cache"
            raise CacheError(f"cache.path={folder}: {why} (skd cache build)") from None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:  # the last: deep JSON
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


# -- bits ----------------------------------------------------------------------------------------------------------


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Pack ``values`` (below 2 ** width) into ``width`` bits each; return uint8, the last byte padded with zeros."""
    places, packed = np.arange(width - 1, -1, -1), []
    for start in range(0, len(values), PACKED_AT_ONCE):
        bits = (values[start : start + PACKED_AT_ONCE, None] >> places) & 1
        packed.append(np.packbits(bits.astype(np.uint8)))
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def unpack_bits(data: np.ndarray, width: int, count: int, skip: int = 0) -> np.ndarray:
    """Unpack ``count`` values after the first ``skip`` bits, as int64; the inverse of ``pack_bits``."""
    bits = np.unpackbits(data, count=skip + count * width)[skip:].reshape(count, width)
    return bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


# -- writing -------------------------------------------------------------------------------------------------------


def cut(positions: Sequence[int], per_shard: int) -> list[range]:
    """Return the samples of each shard: consecutive ones, until their positions reach ``per_shard``."""
    shards, start, filled = [], 0, 0
    for i, count in enumerate(positions):
        filled += count
        if filled >= per_shard or i == len(positions) - 1:
            shards.append(range(start, i + 1))
            start, filled = i + 1, 0
    return shards


def plan_of(digests: Iterable[bytes], shards: Iterable[range]) -> str:
    """Return a digest of all samples, in their order, and of the cut into shards."""
    plan = hashlib.sha256(json.dumps([[s.start, s.stop] for s in shards]).encode())
    for digest in digests:
        plan.update(digest)
    return plan.hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def write_shard(
    folder: Path, number: int, trajectories: Sequence[Trajectory], teacher: TeacherRows, settings: Settings, v: int
) -> Shard:
    """Encode ``trajectories`` and write them as one shard, whose bytes depend only on the arguments; ``v``: V."""
    layout, keys = Layout.of(settings, v), [t.key for t in trajectories]
    counts = [len(t.target_ids) for t in trajectories]
    teacher.encode(trajectories)
    try:
        request = [(t.key, range(n)) for t, n in zip(trajectories, counts, strict=True)]
        if layout.content == "hidden":
            tensors, entries = {"hidden": teacher.rows(request)}, [0] * len(counts)
        else:
            name = "rs_kd" if layout.content == "rs_kd" else "top_k"
            options = settings.classes.model_copy(update={"sampler": name})
            seeds = [seed_of(settings.run.seed, "cache", t.digest.hex()) for t in trajectories]
            tensors, entries = _packed(teacher.classes(request, seeds, options), counts, layout)
    finally:
        teacher.release(keys)
    tensors["digests"] = torch.frombuffer(bytearray(b"".join(t.digest for t in trajectories)), dtype=torch.uint8)
    tensors |= {"positions": torch.tensor(counts, dtype=torch.int32), "entries": torch.tensor(entries).int()}
    path = folder / shard_name(number)
    with replacing(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    size = path.stat().st_size
    shard = Shard(path.name, sha256(path), _index_digest(tensors), len(keys), sum(counts), sum(entries), size)
    write_text(path.with_suffix(".json"), json.dumps(asdict(shard)))  # written last: it marks the shard as complete
    return shard


def finished_shard(folder: Path, number: int) -> Shard | None:
    """Return the record of a shard that an earlier build completed; None if the shard must be written."""
    path = folder / shard_name(number)
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        return shard if sha256(path) == shard.sha256 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def complete(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a complete cache and remove all other files but the shards."""
    manifest.write(folder)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove files that only a build needs; a kill may interrupt this, so it may run again."""
    for file in (*folder.glob("shard-*.json"), *folder.glob(".*.tmp"), folder / PLAN):
        file.unlink(missing_ok=True)
    sync(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second build out of ``folder``, creating it if needed.  Raises CacheError; a kill frees the lock."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise CacheError(f"cache.path={folder}: cannot be written ({error.strerror}); give a folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CacheError(f"cache.path={folder}: another build is writing to it") from None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise CacheError(f"cache.path={folder}: another build has just ended; repeat the command")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_head(folder: Path, head: LMHead) -> str:
    """Write the LM head and return the SHA-256 of its file."""
    tensors = {"head": head.weight_VH} | ({} if head.bias_V is None else {"bias": head.bias_V})
    with replacing(folder / HEAD) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            None if (head.scale, head.cap) == (1.0, None) else {"logits": json.dumps([head.scale, head.cap])},
        )
    return sha256(folder / HEAD)


def _packed(targets: SparseTargets, counts: Sequence[int], layout: Layout) -> tuple[dict[str, Tensor], list[int]]:
    """Return the tensors of a shard, and the number of entries of each sample."""
    if layout.content == "top_k":
        ids = pack_bits(targets.ids_NC.flatten().cpu().numpy(), layout.id_bits)
        return {"ids": torch.from_numpy(ids), "probs": targets.probs_NC}, [0] * len(counts)
    used = targets.probs_NC > 0
    drawn = (targets.probs_NC[used].double() * layout.classes).round().long()
    entries = [int(rows.sum()) for rows in used.split(list(counts))]
    ids = pack_bits(targets.ids_NC[used].cpu().numpy(), layout.id_bits)
    return {
        "ids": torch.from_numpy(ids),
        "counts": torch.from_numpy(pack_bits(drawn.cpu().numpy(), layout.count_bits)),
    }, entries


def _index_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in INDEX:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
