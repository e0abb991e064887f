"""Byte-level BPE: any text is representable, and no download is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conda_dist.launch.data.sources import until
from conda_dist.launch.job.config import ConfigError, TokenizerConfig


def train(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a byte-level BPE on the first `sample_mb` of the documents.

    The result depends on the documents alone, not on the number of threads. A vocabulary smaller
    than asked for is what a text too short for more merges gives.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, int(config.sample_mb * 1e6)), trainer)
    return tokenizer


def _sample(documents: Iterable[str], size: int) -> Iterator[str]:
    """Documents until `size` characters are reached, the last one cut."""
    for document in until(size, documents):
        yield document[:size]
        size -= len(document)


def read(path: str | Path) -> Tokenizer:
    """Reads a `tokenizers` JSON file; raises ConfigError if it is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} is not a tokenizers JSON file: {error}") from None


def end_of_text_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Id of the token that ends a document; raises ConfigError if the vocabulary lacks it."""
    token = tokenizer.token_to_id(config.end_of_text)
    if token is None:
        raise ConfigError(
            f"the tokenizer has no token {config.end_of_text!r}: set tokenizer.end_of_text to "
            "the one that ends its documents"
        )
    return int(token)


def token_dtype(tokenizer: Tokenizer) -> npt.DTypeLike:
    """The smallest unsigned type that holds every token id."""
    return np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything that decides how text becomes tokens."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:20]
