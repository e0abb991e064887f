"""Which sequences make up step s: the same ones however many ranks there are.

A sequence is a window of `sequence_length + 1` tokens: the model reads all but the last and
predicts all but the first. The global batch of a step is a function of (seed, step); a rank
takes its rows of it. So changing the number of ranks changes neither the data nor its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from conda_dist.launch.data import sources
from conda_dist.launch.data.tokenizer import encode
from conda_dist.launch.job.config import ConfigError, DataConfig

Tokens = npt.NDArray[np.int64]


def row_range(batch: int, rank: int, size: int) -> tuple[int, int]:
    """First and past-the-last row of rank `rank` of `size`: shares differ by at most one row.

    Raises:
        ConfigError: There are more ranks than rows.
    """
    if size > batch:
        raise ConfigError(
            f"training.global_batch_size {batch} leaves some of the {size} ranks without a "
            f"sequence: raise it to at least {size} or start at most {batch} ranks"
        )
    return rank * batch // size, (rank + 1) * batch // size


def micro_batches(rows: Tokens, most: int, size: int) -> list[Tokens]:
    """Cuts one rank's rows into as many micro-batches as the busiest rank needs.

    Args:
        rows: This rank's rows, (b, sequence_length + 1).
        most: Rows of the rank that has the most. Every rank must run the same number of
            forward passes, since each of them communicates.
        size: Most rows per micro-batch.

    Returns:
        Micro-batches of near-equal size; one may be empty on a rank with few rows.
    """
    return np.array_split(rows, -(-most // size))


class Batches(Protocol):
    """The training data as the loop sees it."""

    def rows(self, step: int, first: int, last: int) -> Tokens:
        """Rows first..last of step's global batch, (last - first, sequence_length + 1)."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the last step asked for; equal on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a position saved by `state_dict`."""


class TokenBatches:
    """Windows of a token file, in a new order every epoch. Keeps no position of its own."""

    def __init__(self, tokens: npt.NDArray[Any], length: int, batch: int, seed: int) -> None:
        """Cuts `tokens` (flat) into windows of `length` + 1, overlapping by one token.

        Raises:
            ConfigError: There are too few tokens for a single window.
        """
        self._tokens, self._length, self._batch, self._seed = tokens, length, batch, seed
        self._windows = (len(tokens) - 1) // length
        if self._windows < 1:
            raise ConfigError(
                f"the training text has {len(tokens)} tokens, fewer than one sequence of "
                f"training.sequence_length {length}: shorten it or give more text"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def windows(self) -> int:
        """Sequences in one epoch."""
        return self._windows

    def rows(self, step: int, first: int, last: int) -> Tokens:
        """Rows first..last of step's global batch, (last - first, sequence_length + 1)."""
        positions = range(step * self._batch + first, step * self._batch + last)
        return windows_at(self._tokens, map(self._window, positions), self._length)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts what `state_dict` returns."""

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self._windows)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = epoch, generator.permutation(self._windows)
        return int(self._order[1][index])


def windows_at(tokens: npt.NDArray[Any], indices: Any, length: int) -> Tokens:
    """The windows number `indices` of a flat token array, (len(indices), length + 1)."""
    rows = [tokens[i * length : i * length + length + 1].astype(np.int64) for i in indices]
    return np.stack(rows) if rows else np.empty((0, length + 1), np.int64)


class StreamBatches:
    """Windows of a streamed data set, shuffled in blocks that are read ahead.

    Every rank reads the same stream and keeps its own rows: simple, and independent of the number
    of ranks; what it costs is tokenizing everything on each rank. Steps must be asked for in
    order. The saved position is that of the current block's start, from which the block is read
    again, so nothing of it needs to be stored.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        end_of_text: int,
        *,
        length: int,
        batch: int,
        seed: int,
    ) -> None:
        """Opens the stream; reads nothing yet."""
        self._config, self._tokenizer, self._end_of_text = config, tokenizer, end_of_text
        self._length, self._batch, self._seed = length, batch, seed
        self._size = config.shuffle_block
        self._open(stream=None)
        self._leftover = np.empty(0, np.uint32)
        self._number = -1
        self._start: dict[str, Any] = {}
        self._blocks: dict[int, Tokens] = {}

    def rows(self, step: int, first: int, last: int) -> Tokens:
        """Rows first..last of step's global batch, (last - first, sequence_length + 1)."""
        begin, end = step * self._batch, (step + 1) * self._batch
        wanted = range(begin // self._size, (end - 1) // self._size + 1)
        while self._number < wanted[-1]:
            self._read_block()
        # The position to resume from must still contain the next step's first row.
        self._blocks = {n: block for n, block in self._blocks.items() if n >= wanted[0]}
        rows = [
            self._blocks[position // self._size][position % self._size]
            for position in range(begin + first, begin + last)
        ]
        return np.stack(rows) if rows else np.empty((0, self._length + 1), np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Number, stream position and left-over tokens at the current block's start."""
        return self._start

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads the block again that was current when `state` was saved."""
        if not state:
            return
        self._open(state["stream"])
        self._leftover = np.array(state["leftover"], np.uint32)
        self._number = state["block"] - 1
        self._read_block()

    def _open(self, stream: dict[str, Any] | None) -> None:
        self._barren = stream is None  # nothing found since the stream's very start
        self._dataset = sources.open_hf(self._config, self._config.hf_split)
        if stream is not None:
            self._dataset.load_state_dict(stream)
        self._texts = iter(self._dataset)

    def _read_block(self) -> None:
        """Reads and shuffles the next block of windows, noting where it started."""
        self._number += 1
        self._start = {
            "block": self._number,
            "stream": self._dataset.state_dict(),
            "leftover": self._leftover.tolist(),
        }
        needed = self._size * self._length + 1
        parts, count = [self._leftover], len(self._leftover)
        while count < needed:
            for ids in encode(self._tokenizer, self._next_documents(), self._end_of_text):
                parts.append(ids)
                count += len(ids)
        tokens = np.concatenate(parts)
        self._leftover = tokens[needed - 1 :]
        order = np.random.default_rng([self._seed, self._number]).permutation(self._size)
        self._blocks[self._number] = windows_at(tokens, order, self._length)

    def _next_documents(self, count: int = 64) -> Iterator[str]:
        """The next few training documents, starting over where the stream ends."""
        found = 0
        for record in self._texts:
            text = sources.text_of(record, self._config.text_field, self._config.hf)
            held_out = not self._config.hf_val_split and sources.in_validation(
                text, self._config.val_fraction
            )
            if text and not held_out:
                self._barren = False
                yield text
                found += 1
                if found == count:
                    return
        if self._barren:
            raise ConfigError(f"data.hf: {self._config.hf} holds no training text")
        self._open(stream=None)
