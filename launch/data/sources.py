"""Where documents come from: the standard library, files, or a Hugging Face set.

A source yields documents in a fixed order, with whether each is held out for validation. It can say
what it would read without reading it, so that the token cache knows when it is out of date.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conda_dist.launch.job.config import ConfigError, DataConfig

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_PLAIN = {".txt", ".md", ".py", ".rst"}
_PIECE = 4096  # characters
_READABLE = (*sorted(_PLAIN), ".jsonl", ".jsonl.gz", ".parquet")


Document = tuple[str, bool]
"""A text, not empty, and whether it is held out."""


def in_validation(document: str, fraction: float) -> bool:
    """Whether a document is held out: decided by its text alone.

    So the split is the same on every rank and host, duplicates of a document stay on one side,
    and adding files moves no other document across.
    """
    digest = hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


class FileSource:
    """Documents in files: plain text, JSON lines (gzipped or not) and parquet."""

    def __init__(self, config: DataConfig) -> None:
        """Lists the files; raises ConfigError if a path is missing or holds nothing readable."""
        self._field, self._fraction = config.text_field, config.val_fraction
        # Shells pass a backslash and an n where a line end is meant.
        self._separator = config.text_separator.replace("\\n", "\n").replace("\\t", "\t")
        if config.path:
            self._files = [file for path in config.path for file in _expand(path)]
        else:
            library = Path(sysconfig.get_path("stdlib"))
            self._files = sorted(
                file
                for file in library.rglob("*.py")
                if not _NOT_LIBRARY & set(file.relative_to(library).parts)
            )
            if not self._files:
                raise ConfigError(f"no Python sources under {library}: set data.path or data.hf")

    def signature(self) -> list[Any]:
        """What decides the documents' content: paths, sizes (bytes), mtimes (ns) and options."""
        listing = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files
        ]
        return [self._field, self._separator, self._fraction, listing]

    def documents(self) -> Iterator[Document]:
        """The documents, in the order of the sorted files; raises ConfigError if one is damaged."""
        for file in self._files:
            try:
                for text in filter(None, self._read(file)):
                    yield text, in_validation(text, self._fraction)
            # Of the system, gzip, zlib, UTF-8 and JSON; pyarrow's derive from some of them.
            except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    f"data.path: {file} cannot be read ({error}): mend it, or leave it out"
                ) from error

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix == ".parquet":
            yield from self._read_parquet(file)
        elif file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from self._read_json_lines(file)
        else:
            text = file.read_text(encoding="utf-8", errors="replace")
            if self._separator:
                yield from text.split(self._separator)
            elif len(self._files) == 1:
                yield from _paragraphs(text)
            else:
                yield text

    def _read_json_lines(self, file: Path) -> Iterator[str]:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{file}, line {number}, is not JSON: {error}") from None
                yield text_of(record, self._field, f"{file}, line {number}")

    def _read_parquet(self, file: Path) -> Iterator[str]:
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.ParquetFile(file)
            if self._field not in (names := table.schema_arrow.names):
                text_of(dict.fromkeys(names), self._field, str(file))
            for batch in table.iter_batches(columns=[self._field]):
                for record in batch.to_pylist():
                    yield text_of(record, self._field, str(file))
        except ArrowException as error:  # not all derive from what `documents` catches
            raise ValueError(str(error)) from error


class HubSource:
    """The first documents of a Hugging Face data set, read as they are downloaded."""

    def __init__(self, config: DataConfig) -> None:
        """Reads nothing yet."""
        self._config = config

    def signature(self) -> list[Any]:
        """What decides the documents: the set, its splits, and how much of it is read."""
        c = self._config
        which = [c.hf, c.hf_config, c.hf_revision, c.hf_split, c.hf_val_split]
        return [*which, c.hf_mb, c.val_fraction, c.text_field]

    def documents(self) -> Iterator[Document]:
        """`hf_mb` of the training split, then the share of the validation split, if it has one."""
        config, size = self._config, self._config.hf_mb * 1e6
        for text in self._first(config.hf_split, size):
            held_out = not config.hf_val_split and in_validation(text, config.val_fraction)
            yield text, held_out
        if config.hf_val_split:
            for text in self._first(config.hf_val_split, size * config.val_fraction):
                yield text, True

    def _first(self, split: str, size: float) -> Iterator[str]:
        """The texts of a split until `size` characters are reached."""
        field, name = self._config.text_field, self._config.hf
        texts = (text_of(record, field, name) for record in self._open(split))
        return until(size, filter(None, texts))

    def _open(self, split: str) -> Any:
        import datasets

        config = self._config
        try:
            return datasets.load_dataset(
                config.hf,
                config.hf_config or None,
                revision=config.hf_revision or None,
                split=split,
                streaming=True,
            )
        except (OSError, ValueError) as error:
            name = f"{config.hf} ({config.hf_config})" if config.hf_config else config.hf
            raise ConfigError(f"data.hf: cannot open {name}, split {split}: {error}") from error


Source = FileSource | HubSource


def open_source(config: DataConfig) -> Source:
    """The source that the config names."""
    return HubSource(config) if config.hf else FileSource(config)


def until(size: float, texts: Iterable[str]) -> Iterator[str]:
    """Texts until `size` characters are reached."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def _paragraphs(text: str) -> Iterator[str]:
    """A text that is all there is, cut at blank lines, so that some of it can be held out."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= _PIECE:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def text_of(record: Any, field: str, where: str) -> str:
    """The text of one record, "" where it is null; raises ConfigError naming `where` otherwise."""
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ConfigError(f"{where} has no field {field!r}; found {found}: set data.text_field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {field!r} is a {type(text).__name__}, not a text")
    return text


def _expand(path: str) -> list[Path]:
    """The readable files a path, folder or glob stands for, sorted."""
    found = Path(path).expanduser()
    if found.is_dir():
        files = [file for file in found.rglob("*") if file.name.endswith(_READABLE)]
    elif found.is_file():
        files = [found]
    else:
        files = [Path(match) for match in glob.glob(str(found), recursive=True)]
    files = [file for file in files if file.is_file()]
    if not files:
        kinds = ", ".join(_READABLE)
        raise ConfigError(f"data.path {path!r} names no file (in folders, {kinds} are read)")
    for file in files:
        if not file.name.endswith(_READABLE):
            raise ConfigError(f"data.path: {file} is not one of {', '.join(_READABLE)}")
    return sorted(files)
