"""A teacher's outputs on disk, written once by teacher actors and read in a teacher's place (docs/off_policy.md).

A cache is a folder of safetensors shards, which are memory-mapped, and ``manifest.json``.  What a shard holds of each
eligible position depends on the class sampler of the settings:

    hidden   (none)           the last hidden state, in the teacher's type; the LM head is in a file of its own: exact
    rs_kd    (rs_kd)          the drawn ids, ceil(log2 V) bits each, and their counts, ceil(log2(U + 1)) bits each.  The
                              counts of a position sum to U, which tells where the next one starts: no lengths are kept
    top_k    (a truncation)   the K largest probabilities, float32, and their ids: every truncation is made of these

and, for each sample, eight bytes that name its tokens (``Trajectory.digest``) and its sizes.  Samples are found by
content, so neither their order nor the keys that a run gives them matter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
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
from onpolicy_skd.storage.files import digest_of, replacing, sha256, sync, write_text
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import Trajectory, seed_of

FORMAT = 1
MANIFEST, PLAN, HEAD, LOCK = "manifest.json", "building.json", "head.safetensors", ".lock"
INDEX = ("digests", "positions", "entries")  # tensors of a shard that say where its samples are
PACKED_AT_ONCE = 65_536  # values; a multiple of 8, so that parts end on whole bytes
Content = Literal["hidden", "rs_kd", "top_k"]


class CacheError(ConfigError):
    """A cache that is damaged, incomplete, or made of something else; the message names the file or the difference."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a cache holds of a position."""

    content: Content
    vocabulary: int  # V
    classes: int  # U draws or K classes a position; 0 of hidden states
    temperature: float | None  # of the distributions; None of hidden states

    @staticmethod
    def of(settings: Settings, vocabulary: int) -> Layout:
        own, temperature = settings.classes, settings.alignment.temperature
        if own.sampler == "none":
            return Layout("hidden", vocabulary, 0, None)
        if own.sampler == "rs_kd":
            return Layout("rs_kd", vocabulary, own.draws, temperature)
        return Layout("top_k", vocabulary, min(own.k, vocabulary), temperature)

    @property
    def id_bits(self) -> int:
        return (self.vocabulary - 1).bit_length()

    @property
    def count_bits(self) -> int:
        return self.classes.bit_length()  # of 0 to U

    def described(self) -> dict[str, Any]:
        """By the settings that it follows from."""
        count = {"hidden": {}, "rs_kd": {"classes.draws": self.classes}, "top_k": {"classes.k": self.classes}}
        return {"content": self.content, "alignment.temperature": self.temperature, **count[self.content]}

    def serves(self, wanted: Layout) -> bool:
        """Whether a cache of this layout holds what one of layout ``wanted`` would."""
        same = replace(self, classes=0) == replace(wanted, classes=0)
        return same and (self.classes == wanted.classes or (self.content == "top_k" and self.classes > wanted.classes))


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a cache."""

    file: str
    sha256: str
    index: str  # digest of its INDEX tensors, which are read when a cache is opened
    samples: int
    positions: int
    entries: int  # (id, count) pairs of rs_kd
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    provenance: dict[str, Any]  # teacher, tokenizer, template, data: see ``provenance.provenance``
    layout: Layout
    plan: str  # digest of all samples, in their order, and of the cut into shards
    head: str | None = None  # SHA-256 of the LM head's file, beside hidden states
    shards: list[Shard] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.shards)

    @property
    def positions(self) -> int:
        return sum(s.positions for s in self.shards)

    @property
    def information_bits(self) -> float:
        """Bits of the records alone: of rs_kd ids, counts and a length for each position; of top_k ids and floats."""
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
        """Raises CacheError for what is not there, damaged, or of another format."""
        path = folder / name
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("digest") != digest_of(record):
                raise CacheError(f"{path} is damaged (its digest differs); restore it or build the cache anew")
            if record.pop("format") != FORMAT:
                raise CacheError(f"{path}: this version reads format {FORMAT}")
            layout, shards = Layout(**record.pop("layout")), [Shard(**s) for s in record.pop("shards")]
            return Manifest(layout=layout, shards=shards, **record)
        except FileNotFoundError:
            building = (folder / PLAN).exists()
            why = "is not complete: the same build goes on with it" if building else f"has no {name}, so it is no cache"
            raise CacheError(f"cache.path={folder}: {why} (skd cache build)") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


# -- bits ----------------------------------------------------------------------------------------------------------


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """``values`` (below 2 ** width) in ``width`` bits each, one after another: uint8, the last byte filled with 0."""
    places, packed = np.arange(width - 1, -1, -1), []
    for start in range(0, len(values), PACKED_AT_ONCE):
        bits = (values[start : start + PACKED_AT_ONCE, None] >> places) & 1
        packed.append(np.packbits(bits.astype(np.uint8)))
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def unpack_bits(data: np.ndarray, width: int, count: int, skip: int = 0) -> np.ndarray:
    """Inverse of ``pack_bits``: ``count`` values after the first ``skip`` bits, int64."""
    bits = np.unpackbits(data, count=skip + count * width)[skip:].reshape(count, width)
    return bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


# -- writing -------------------------------------------------------------------------------------------------------


def cut(positions: Sequence[int], per_shard: int) -> list[range]:
    """Samples of each shard: consecutive ones, until their positions reach ``per_shard``."""
    shards, start, filled = [], 0, 0
    for i, count in enumerate(positions):
        filled += count
        if filled >= per_shard or i == len(positions) - 1:
            shards.append(range(start, i + 1))
            start, filled = i + 1, 0
    return shards


def plan_of(digests: Iterable[bytes], shards: Iterable[range]) -> str:
    found = hashlib.sha256(json.dumps([[s.start, s.stop] for s in shards]).encode())
    for digest in digests:
        found.update(digest)
    return found.hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def write_shard(
    folder: Path, number: int, trajectories: Sequence[Trajectory], teacher: TeacherRows, settings: Settings, v: int
) -> Shard:
    """Encodes ``trajectories`` and writes them as one shard, whose bytes depend on these arguments alone."""
    layout, keys = Layout.of(settings, v), [t.key for t in trajectories]
    counts = [len(t.response_ids) for t in trajectories]
    teacher.encode(trajectories)
    try:
        wanted = [(t.key, range(n)) for t, n in zip(trajectories, counts, strict=True)]
        if layout.content == "hidden":
            tensors, entries = {"hidden": teacher.rows(wanted)}, [0] * len(counts)
        else:
            name = "rs_kd" if layout.content == "rs_kd" else "top_k"
            options = settings.classes.model_copy(update={"sampler": name})
            seeds = [seed_of(settings.run.seed, "cache", t.digest.hex()) for t in trajectories]
            tensors, entries = _packed(teacher.classes(wanted, seeds, options), counts, layout)
    finally:
        teacher.release(keys)
    tensors["digests"] = torch.frombuffer(bytearray(b"".join(t.digest for t in trajectories)), dtype=torch.uint8)
    tensors |= {"positions": torch.tensor(counts, dtype=torch.int32), "entries": torch.tensor(entries).int()}
    path = folder / shard_name(number)
    with replacing(path) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside)
    size = path.stat().st_size
    shard = Shard(path.name, sha256(path), _index_digest(tensors), len(keys), sum(counts), sum(entries), size)
    write_text(path.with_suffix(".json"), json.dumps(asdict(shard)))  # after the shard: it says that it is whole
    return shard


def finished_shard(folder: Path, number: int) -> Shard | None:
    """What an earlier build has left of a shard; None if it must be written (again)."""
    path = folder / shard_name(number)
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        return shard if sha256(path) == shard.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def finish(folder: Path, manifest: Manifest) -> None:
    """The cache is complete: its manifest, and nothing else but the shards, stays."""
    manifest.write(folder)
    clean(folder)


def clean(folder: Path) -> None:
    """Removes what only a build needs; it may have been killed while it did so."""
    for left in (*folder.glob("shard-*.json"), *folder.glob(".*.tmp"), folder / PLAN):
        left.unlink(missing_ok=True)
    sync(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second build out of ``folder``, which is made if need be.  Raises CacheError; a kill frees the lock."""
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
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_head(folder: Path, head_VG: Tensor) -> str:
    """Returns the SHA-256 of its file."""
    with replacing(folder / HEAD) as beside:
        save_file({"head": head_VG.detach().cpu().contiguous()}, beside)
    return sha256(folder / HEAD)


def _packed(targets: SparseTargets, counts: Sequence[int], layout: Layout) -> tuple[dict[str, Tensor], list[int]]:
    """The tensors of a shard, and how many entries each sample has."""
    if layout.content == "top_k":
        ids = pack_bits(targets.ids_NC.flatten().cpu().numpy(), layout.id_bits)
        return {"ids": torch.from_numpy(ids), "probs": targets.probs_NC}, [0] * len(counts)
    used = targets.probs_NC > 0
    drawn = (targets.probs_NC[used].double() * layout.classes).round().long()
    entries = [int(part.sum()) for part in used.split(list(counts))]
    ids = pack_bits(targets.ids_NC[used].cpu().numpy(), layout.id_bits)
    return {
        "ids": torch.from_numpy(ids),
        "counts": torch.from_numpy(pack_bits(drawn.cpu().numpy(), layout.count_bits)),
    }, entries


def _index_digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in INDEX:
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()
