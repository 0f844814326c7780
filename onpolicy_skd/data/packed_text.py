"""Packed text: documents one after another, cut into samples of equal length.

The token stream is ``[end] document [end] document [end] ...`` with the tokenizer's end of sequence, which ends a
document and starts the next one, so that a document's first token is predicted from it.  The stream is written to disk
once, as uint32, and read memory-mapped: a sample costs no memory until it is used, and the order of samples is a pure
function of seed and step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from onpolicy_skd.config.schema import DataSettings
from onpolicy_skd.data.rows import DataError, check_text, read_hub, read_jsonl
from onpolicy_skd.storage.files import replacing, sha256, write_text
from onpolicy_skd.types import Prompt

DOCUMENTS_AT_ONCE = 256  # documents tokenized together
TOKENS_BETWEEN_MESSAGES = 1_000_000
LARGEST_DOCUMENT = 64 * 2**20  # bytes of a .txt file, which is tokenized as a whole
SUFFIXES = (".jsonl", ".parquet", ".txt")


class Lazy(Sequence[Prompt]):
    """Sequence of the prompts ``make(i)`` for ``i`` in ``indices``, each made when it is accessed."""

    def __init__(self, make: Callable[[int], Prompt], indices: Sequence[int]) -> None:
        self._make = make
        self._indices = indices
        self.digest = ""  # SHA-256 of packed text

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return Lazy(self._make, self._indices[index])
        return self._make(self._indices[index])


def samples(name: str, tokens: np.ndarray, length: int, end_id: int, separate: bool) -> Lazy:
    """Return samples of ``length`` tokens of the stream ``tokens``; the remainder at its end is not used."""

    def sample(number: int) -> Prompt:
        ids = tokens[number * length : (number + 1) * length]
        starts = np.flatnonzero(ids[1:] == end_id) + 1 if separate else np.empty(0, np.int64)
        return Prompt(f"text#{number + 1}", ids.tolist(), "", "", starts, f"{name}#{number + 1}")

    return Lazy(sample, range(len(tokens) // length))


def pack(settings: DataSettings, tokenizer: Any, folder: Path, log: Callable[[str], None]) -> Lazy:
    """Return the samples of ``settings``, written to ``folder`` unless they are there already.

    Raises DataError for a file, row or data set that cannot be read, or holds less than one sample.
    """
    name, source = _source(settings)
    identity = [source, settings.text_column, settings.tokens, _rules(tokenizer), tokenizer.eos_token_id]
    file = folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.tokens"
    if file.exists():
        log(f"text: {file.stat().st_size // 4} packed tokens reused from {file}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, settings, tokenizer, source, log)
    tokens, length = np.memmap(file, dtype="<u4", mode="r"), settings.sequence_length
    if len(tokens) < length:
        raise DataError(f"{name}: holds {len(tokens)} tokens, less than data.sequence_length={length}")
    text = samples(name, tokens, length, tokenizer.eos_token_id, settings.documents == "separate")
    text.digest = sha256(file)
    return text


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a digest that changes with any token's id, and with the end of sequence."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, tokenizer.eos_token_id]).encode()).hexdigest()


def _rules(tokenizer: Any) -> str:
    """Return a digest that changes with the rules that turn text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    state = {key: rule for key, rule in rules.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps([vocabulary_digest(tokenizer), state], sort_keys=True).encode()).hexdigest()


def _write(file: Path, settings: DataSettings, tokenizer: Any, source: Any, log: Callable[[str], None]) -> None:
    budget, end = settings.tokens, [tokenizer.eos_token_id]
    written, documents, next_message = 0, -1, 0  # -1, because the first end of sequence ends no document
    with replacing(file) as temporary, temporary.open("wb") as out:
        texts = _documents(settings, source)
        for ids in itertools.chain([end], (ids + end for ids in _tokenized(texts, tokenizer))):
            kept = ids if budget is None else ids[: budget - written]
            np.asarray(kept, dtype="<u4").tofile(out)
            written, documents = written + len(kept), documents + 1
            if written >= next_message:
                log(f"text: {written} tokens of {documents} documents packed")
                next_message = written + TOKENS_BETWEEN_MESSAGES
            if budget is not None and written >= budget:
                break
        about = {"tokens": written, "documents": documents, "source": source, "column": settings.text_column}
        write_text(file.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    if budget is not None and written < budget:
        log(f"text: data.tokens={budget}, but there are only {written} tokens")
    log(f"text: {written} tokens of {documents} documents packed into {file}")


def _tokenized(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    while documents := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
        # Special tokens in a document are tokenized as text, or they would look like the end of a document.
        yield from tokenizer(documents, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _source(settings: DataSettings) -> tuple[str, Any]:
    """Return a name for the samples and the identity of the text: files with size and time, or the hub's names."""
    if settings.train_file is None:
        names = [settings.name, settings.subset, settings.train_split]
        local = sorted(f for f in Path(str(settings.name)).rglob("*") if f.is_file())  # empty for a hub data set
        return f"{settings.name}:{settings.train_split}", [*names, *_stamps(local)]
    root = settings.train_file
    files = sorted(f for f in root.rglob("*") if f.suffix in SUFFIXES) if root.is_dir() else [root]
    if not files or not all(f.exists() for f in files) or files[0].suffix not in SUFFIXES:
        raise DataError(f"data.train_file={root}: no text there; accepted: {', '.join(SUFFIXES)} or a folder of them")
    return root.name, _stamps(files)


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    return [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _documents(settings: DataSettings, source: Any) -> Iterator[str]:
    """Yield each document that has text.  Raises DataError."""
    rows = _hub_rows(settings) if settings.train_file is None else _file_rows([Path(f) for f, *_ in source], settings)
    for where, row in rows:
        text = row.get(settings.text_column)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: column {settings.text_column!r} is missing or not text; this row has "
                f"{', '.join(map(repr, row)) or 'no columns'} (set data.text_column)"
            )
        check_text(text, f"{where}: column {settings.text_column!r}")
        if text.strip():
            yield text


def _file_rows(files: Sequence[Path], settings: DataSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        if file.suffix == ".txt":
            if file.stat().st_size > LARGEST_DOCUMENT:
                raise DataError(
                    f"{file}: over {LARGEST_DOCUMENT // 2**20} MiB, and a .txt file is one document; give its "
                    "documents as rows of a .jsonl or .parquet file"
                )
            try:
                yield str(file), {settings.text_column: file.read_text(encoding="utf-8-sig")}
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None
        else:
            rows = read_jsonl(file) if file.suffix == ".jsonl" else _parquet_rows(file, settings.text_column)
            yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            if column not in opened.schema_arrow.names:
                yield dict.fromkeys(opened.schema_arrow.names)  # so that the error names the existing columns
                return
            for batch in opened.iter_batches(DOCUMENTS_AT_ONCE, columns=[column]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _hub_rows(settings: DataSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = read_hub(str(settings.name), settings.subset, settings.train_split, streaming=True)
    return ((f"{settings.name}:{settings.train_split} row {number}", row) for number, row in enumerate(rows, 1))
