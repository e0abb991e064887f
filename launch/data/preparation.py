"""From the config to tokens ready to train on, prepared once per host and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from conda_dist.launch.cluster.process_group import World, together
from conda_dist.launch.data import cache, sources
from conda_dist.launch.data import tokenizer as bpe
from conda_dist.launch.data.batches import TokenBatches, Tokens, windows_at
from conda_dist.launch.job.config import Config, ConfigError

_FORMAT = 2
"""Part of every cache key: raise it when the cached files change their meaning."""

_BATCH = 256
"""Documents encoded per call, enough to keep the tokenizer's threads busy."""

_TOKENIZER, _TRAIN, _VAL = "tokenizer.json", "train.bin", "val.bin"


@dataclass(frozen=True, slots=True)
class Data:
    """What the loop trains and validates on."""

    batches: TokenBatches
    validation: Tokens  # fixed: (val_sequences or fewer, sequence_length + 1)
    vocab_size: int
    fingerprint: str  # hash of text and tokenizer: equal on all ranks, in a run and its resume
    description: str


def open_data(config: Config, world: World) -> Data:
    """Prepares what is not cached yet (one process per host does) and opens it on every rank.

    Raises ConfigError or JobError on every rank: text cannot be read, or is too little for one
    sequence.
    """
    with together(world, "preparing the data", patient=True):
        if world.local_rank == 0:
            _prepare(config)
    with together(world, "opening the data"):
        return _open(config, *_prepare(config))


def _prepare(config: Config) -> tuple[Path, dict[str, Any]]:
    """The cache entry with the tokenizer and all documents' tokens, made if absent; its facts."""
    source, root = sources.open_source(config.data), cache.cache_root(config.data.cache)
    tokenizer = bpe.read(_prepare_tokenizer(config, root, source))

    def build(folder: Path) -> dict[str, Any]:
        return _encode(folder, source.documents(), tokenizer, config)

    identity = [bpe.fingerprint(tokenizer), config.tokenizer.end_of_text]
    key = cache.digest(_FORMAT, "tokens", source.signature(), identity)
    entry = root / f"tokens-{key}"
    return entry, cache.build_entry(entry, build)


def _encode(
    folder: Path, documents: Iterable[sources.Document], tokenizer: Tokenizer, config: Config
) -> dict[str, Any]:
    """Writes the tokens of both splits to flat files, a bounded number of documents at a time."""
    end_of_text, dtype = bpe.end_of_text_id(tokenizer, config.tokenizer), bpe.token_dtype(tokenizer)
    content, counts, total = hashlib.sha256(), {_TRAIN: 0, _VAL: 0}, 0
    waiting = iter(documents)
    with (folder / _TRAIN).open("wb") as train, (folder / _VAL).open("wb") as val:
        while batch := list(islice(waiting, _BATCH)):
            texts = [text for text, _ in batch]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (_, held_out), encoding in zip(batch, encodings, strict=True):
                name, file = (_VAL, val) if held_out else (_TRAIN, train)
                encoded = np.array([*encoding.ids, end_of_text], dtype).tobytes()
                content.update(encoded)
                file.write(encoded)
                counts[name] += len(encoding.ids) + 1
            total += len(batch)
    tokenizer.save(str(folder / _TOKENIZER))
    return {
        "documents": total,
        "train_tokens": counts[_TRAIN],
        "val_tokens": counts[_VAL],
        "dtype": np.dtype(dtype).name,
        "content": content.hexdigest()[:20],
    }


def _open(config: Config, entry: Path, facts: dict[str, Any]) -> Data:
    training, tokenizer = config.training, bpe.read(entry / _TOKENIZER)
    length = training.sequence_length
    val_windows = (facts["val_tokens"] - 1) // length
    if val_windows < 1:
        raise ConfigError(
            f"the validation split has {facts['val_tokens']} tokens (of {facts['documents']} "
            f"documents), fewer than one sequence of {length}: raise data.val_fraction, "
            "give more text, or set data.text_separator where files hold many documents"
        )
    # Evenly spaced over the split, so that a small set still sees all of it.
    chosen = np.linspace(0, val_windows - 1, min(training.val_sequences, val_windows)).astype(int)
    val = _memmap(entry / _VAL, facts["dtype"])
    batches = TokenBatches(
        _memmap(entry / _TRAIN, facts["dtype"]), length, training.global_batch_size, training.seed
    )
    return Data(
        batches,
        windows_at(val, chosen, length),
        tokenizer.get_vocab_size(),
        cache.digest(facts["content"], bpe.fingerprint(tokenizer)),
        f"{facts['documents']:,} documents, {facts['train_tokens']:,} training and "
        f"{facts['val_tokens']:,} validation tokens, {batches.windows:,} sequences an epoch",
    )


def _prepare_tokenizer(config: Config, root: Path, source: sources.Source) -> Path:
    """Path of the tokenizer's file, trained on the source's text unless given or cached."""
    if config.tokenizer.path:
        return Path(config.tokenizer.path).expanduser()
    settings = config.tokenizer
    trained = [settings.vocab_size, settings.sample_mb, settings.end_of_text]
    key = cache.digest(_FORMAT, "tokenizer", source.signature(), trained)
    entry = root / f"tokenizer-{key}"

    def build(folder: Path) -> dict[str, Any]:
        texts = (text for text, held_out in source.documents() if not held_out)
        bpe.train(texts, settings).save(str(folder / _TOKENIZER))
        return {}

    cache.build_entry(entry, build)
    return entry / _TOKENIZER


def _memmap(file: Path, dtype: str) -> npt.NDArray[Any]:
    """A flat array on disk; an empty file, which cannot be mapped, is an empty array."""
    if file.stat().st_size == 0:
        return np.empty(0, np.dtype(dtype))
    return np.memmap(file, dtype=np.dtype(dtype), mode="r")
