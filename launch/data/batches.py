"""Which sequences make up step s: the same ones however many ranks there are.

A sequence is a window of `sequence_length + 1` tokens: the model reads all but the last and
predicts all but the first. The global batch of a step is a function of (seed, step); a rank
takes its rows of it. So changing the number of ranks changes neither the data nor its order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from conda_dist.launch.job.config import ConfigError

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


class TokenBatches:
    """Windows of a token file, in a new order every epoch. The step alone says where it stands."""

    def __init__(self, tokens: npt.NDArray[Any], length: int, batch: int, seed: int) -> None:
        """Cuts `tokens` (flat) into windows of `length` + 1, overlapping by one token.

        Raises:
            ConfigError: There are too few tokens for a single window.
        """
        self._tokens, self._length, self._batch, self._seed = tokens, length, batch, seed
        self.windows = (len(tokens) - 1) // length
        """Sequences in one epoch."""
        if self.windows < 1:
            raise ConfigError(
                f"the training text has {len(tokens)} tokens, fewer than one sequence of "
                f"training.sequence_length {length}: shorten it or give more text"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def rows(self, step: int, first: int, last: int) -> Tokens:
        """Rows first..last of step's global batch, (last - first, sequence_length + 1)."""
        positions = range(step * self._batch + first, step * self._batch + last)
        return windows_at(self._tokens, map(self._window, positions), self._length)

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = epoch, generator.permutation(self.windows)
        return int(self._order[1][index])


def windows_at(tokens: npt.NDArray[Any], indices: Any, length: int) -> Tokens:
    """The windows number `indices` of a flat token array, (len(indices), length + 1)."""
    rows = [tokens[i * length : i * length + length + 1].astype(np.int64) for i in indices]
    return np.stack(rows) if rows else np.empty((0, length + 1), np.int64)
