"""From the config to tokens ready to train on, prepared once per host and cached."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from conda_dist.launch.cluster.process_group import World, together
from conda_dist.launch.data import cache, sources
from conda_dist.launch.data import tokenizer as bpe
from conda_dist.launch.data.batches import Batches, StreamBatches, TokenBatches, Tokens, windows_at
from conda_dist.launch.job.config import Config, ConfigError

_FORMAT = 1
"""Part of every cache key: raise it when the cached files change their meaning."""

_TOKENIZER, _TRAIN, _VAL = "tokenizer.json", "train.bin", "val.bin"


@dataclass(frozen=True, slots=True)
class Data:
    """What the loop trains and validates on."""

    batches: Batches
    validation: Tokens
    """The fixed validation set, (val_sequences or fewer, sequence_length + 1)."""
    vocab_size: int
    fingerprint: str
    """Hash of the text and the tokenizer: equal on all ranks, and in a run and its resume."""
    description: str


def open_data(config: Config, world: World) -> Data:
    """Prepares what is not cached yet (one process per host does) and opens it on every rank.

    Raises:
        JobError: On every rank, when it failed on any: text that cannot be read, or too little of
            it for one sequence.
    """
    prepare = _prepare_stream if config.data.hf else _prepare_files
    with together(world, "preparing the data", patient=True):
        if world.local_rank == 0:
            prepare(config)
    with together(world, "opening the data"):
        return (_open_stream if config.data.hf else _open_files)(config, *prepare(config))


def _prepare_files(config: Config) -> tuple[Path, dict[str, Any]]:
    """Trains the tokenizer and encodes all documents, unless the cache has them.

    Returns:
        The cache entry and its facts.
    """
    source = sources.FileSource(config.data)
    root, fraction = cache.cache_root(config.data.cache), config.data.val_fraction
    tokenizer_file = _prepare_tokenizer(
        config,
        root,
        source.signature(),
        lambda: (text for text in source.documents() if not sources.in_validation(text, fraction)),
    )
    tokenizer = bpe.read(tokenizer_file)
    identity = [bpe.fingerprint(tokenizer), config.tokenizer.end_of_text]

    def build(folder: Path) -> dict[str, Any]:
        return _encode_files(folder, source.documents(), tokenizer, config)

    key = cache.digest(_FORMAT, "tokens", source.signature(), fraction, identity)
    entry = root / f"tokens-{key}"
    facts = cache.build_entry(entry, build)
    return entry, facts


def _encode_files(
    folder: Path, documents: Iterable[str], tokenizer: Tokenizer, config: Config
) -> dict[str, Any]:
    """Writes the tokens of both splits to flat files, a bounded number of documents at a time."""
    end_of_text, dtype = bpe.end_of_text_id(tokenizer, config.tokenizer), bpe.token_dtype(tokenizer)
    content, counts, total = hashlib.sha256(), {_TRAIN: 0, _VAL: 0}, 0
    held_out: deque[bool] = deque()

    def noted() -> Iterator[str]:
        for text in documents:
            held_out.append(sources.in_validation(text, config.data.val_fraction))
            yield text

    with (folder / _TRAIN).open("wb") as train, (folder / _VAL).open("wb") as val:
        for ids in bpe.encode(tokenizer, noted(), end_of_text):
            name, file = (_VAL, val) if held_out.popleft() else (_TRAIN, train)
            encoded = ids.astype(dtype).tobytes()
            content.update(encoded)
            file.write(encoded)
            counts[name] += len(ids)
            total += 1
    tokenizer.save(str(folder / _TOKENIZER))
    return {
        "documents": total,
        "train_tokens": counts[_TRAIN],
        "val_tokens": counts[_VAL],
        "dtype": np.dtype(dtype).name,
        "content": content.hexdigest()[:20],
    }


def _open_files(config: Config, entry: Path, facts: dict[str, Any]) -> Data:
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


def _prepare_stream(config: Config) -> tuple[Path, dict[str, Any]]:
    """Trains the tokenizer on the stream's start and reads its validation set, unless cached."""
    data, training = config.data, config.training
    root = cache.cache_root(data.cache)
    identity = [data.hf, data.hf_config, data.hf_revision, data.hf_split]
    held_out = [data.hf_val_split, data.val_fraction, data.text_field]
    tokenizer_file = _prepare_tokenizer(
        config,
        root,
        [*identity, *held_out],
        lambda: _stream_documents(config, data.hf_split, validation=False),
    )
    tokenizer = bpe.read(tokenizer_file)
    needed = training.val_sequences * training.sequence_length + 1

    def build(folder: Path) -> dict[str, Any]:
        documents = _stream_documents(config, data.hf_val_split or data.hf_split, validation=True)
        end_of_text, parts, count = bpe.end_of_text_id(tokenizer, config.tokenizer), [], 0
        for ids in bpe.encode(tokenizer, documents, end_of_text):
            parts.append(ids)
            count += len(ids)
            if count >= needed:
                break
        tokens = np.concatenate(parts)[:needed] if parts else np.empty(0, np.uint32)
        tokens.tofile(folder / _VAL)
        tokenizer.save(str(folder / _TOKENIZER))
        return {"val_tokens": len(tokens)}

    key = cache.digest(_FORMAT, "stream", identity, held_out, bpe.fingerprint(tokenizer), needed)
    entry = root / f"stream-{key}"
    facts = cache.build_entry(entry, build)
    return entry, {**facts, "content": [*identity, *held_out]}


def _open_stream(config: Config, entry: Path, facts: dict[str, Any]) -> Data:
    training, tokenizer = config.training, bpe.read(entry / _TOKENIZER)
    length = training.sequence_length
    val = _memmap(entry / _VAL, "uint32")
    if len(val) <= length:
        raise ConfigError(
            f"data.hf: {config.data.hf} has {len(val)} tokens of validation text, fewer than one "
            f"sequence of {length}: raise data.val_fraction or set data.hf_val_split"
        )
    batches = StreamBatches(
        config.data,
        tokenizer,
        bpe.end_of_text_id(tokenizer, config.tokenizer),
        length=length,
        batch=training.global_batch_size,
        seed=training.seed,
    )
    return Data(
        batches,
        windows_at(val, range((len(val) - 1) // length), length),
        tokenizer.get_vocab_size(),
        cache.digest(facts["content"], bpe.fingerprint(tokenizer)),
        f"{config.data.hf} {config.data.hf_config} streamed, {len(val):,} validation tokens",
    )


def _stream_documents(config: Config, split: str, *, validation: bool) -> Iterator[str]:
    """Documents of a streamed split, on the wanted side of the hold-out if it has one."""
    data = config.data
    for record in sources.open_hf(data, split):
        text = sources.text_of(record, data.text_field, data.hf)
        if not text:
            continue
        if data.hf_val_split or sources.in_validation(text, data.val_fraction) == validation:
            yield text


def _prepare_tokenizer(
    config: Config, root: Path, signature: list[Any], documents: Callable[[], Iterable[str]]
) -> Path:
    """Path of the tokenizer's file, trained on `documents()` unless given or cached."""
    if config.tokenizer.path:
        return Path(config.tokenizer.path).expanduser()
    settings = config.tokenizer
    key = cache.digest(
        _FORMAT,
        "tokenizer",
        signature,
        config.data.val_fraction,
        [settings.vocab_size, settings.sample_mb, settings.end_of_text],
    )
    entry = root / f"tokenizer-{key}"

    def build(folder: Path) -> dict[str, Any]:
        bpe.train(documents(), settings).save(str(folder / _TOKENIZER))
        return {}

    cache.build_entry(entry, build)
    return entry / _TOKENIZER


def _memmap(file: Path, dtype: str) -> npt.NDArray[Any]:
    """A flat array on disk; an empty file, which cannot be mapped, is an empty array."""
    if file.stat().st_size == 0:
        return np.empty(0, np.dtype(dtype))
    return np.memmap(file, dtype=np.dtype(dtype), mode="r")
