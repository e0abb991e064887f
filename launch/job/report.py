"""Everything rank 0 tells the outside, so that the loop need not ask who it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conda_dist.launch.cluster.process_group import World, together
from conda_dist.launch.job.config import Config
from conda_dist.launch.job.console import Display
from conda_dist.launch.job.files import DIVERGED, SUMMARY, write_whole
from conda_dist.launch.job.metrics import MetricsWriter, Record
from conda_dist.launch.job.picture import draw_loss, draw_signals

QUIET_S = 10.0
"""Seconds between two lines about a refresh."""


class Reporter:
    """Console, metrics.jsonl, TensorBoard and pictures on rank 0; silent on every other rank."""

    def __init__(self, config: Config, world: World, step: int) -> None:
        """Opens the files to continue after `step` steps; raises JobError if it cannot."""
        self._config, self._world, self._output = config, world, Path(config.output)
        self._writer: MetricsWriter | None = None
        self._display: Display | None = None
        self._error: OSError | None = None
        self._refreshing, self._bases, self._said_at = step, 0, 0.0
        with together(world, f"opening the metrics in {config.output}"):
            if world.is_main:
                for said in (SUMMARY, DIVERGED):  # of an end that is none any more
                    (self._output / said).unlink(missing_ok=True)
                board, steps = config.metrics.tensorboard, config.training.steps
                self._writer = MetricsWriter(self._output, step=step, tensorboard=board)
                self._display = Display(steps, step, config.metrics.console_interval)

    @property
    def failed(self) -> bool:
        """Whether this rank could not write what it was given to record."""
        return self._error is not None

    def require_written(self) -> None:
        """Raises JobError if a record could not be written; to be called on every rank."""
        with together(self._world, f"writing the metrics in {self._output}"):
            if self._error is not None:
                raise self._error

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows the progress bar while the block runs, and closes the files after it."""
        if self._display is None or self._writer is None:
            yield
            return
        try:
            with self._display.bar:
                yield
        finally:
            try:
                self._writer.close()
            except OSError as error:  # of which `failed` has told, or TensorBoard's
                self.note(f"the last metrics could not be written: {error}")

    def facts(self, rows: Mapping[str, str]) -> None:
        """Prints names and values, a line each."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.note(f"{name:<{width}}  {value}")

    def note(self, message: str) -> None:
        """Prints a line."""
        if self._display is not None:
            self._display.note(message)

    def decomposed(self, step: int, name: str) -> None:
        """Counts a new basis, and prints how far a refresh that takes long has come on this rank.

        `name` is the parameter whose momentum has been decomposed.
        """
        now = time.monotonic()
        if step != self._refreshing:
            self._refreshing, self._bases, self._said_at = step, 0, now
        self._bases += 1
        if now - self._said_at > QUIET_S:
            self._said_at = now
            self.note(f"step {step}: rank 0 has {self._bases} new bases, up to {name}")

    def record(self, record: Record) -> None:
        """Writes and shows a record.

        A disk that is full is no reason to leave the other ranks in the midst of a step: see
        `failed`.
        """
        if self._writer is not None and self._display is not None:
            try:
                self._writer.write(record)
            except OSError as error:
                self._error = error
            self._display.update(record)

    def diverged(self, error: Exception) -> None:
        """Marks the run as one that ended because of too many bad steps in a row."""
        if self._display is not None:
            with suppress(OSError):
                (self._output / DIVERGED).write_text(json.dumps({"error": str(error)}) + "\n")

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Draws the curves and marks the run as complete; raises JobError if it cannot."""
        doing = f"writing the curves and {SUMMARY} in {self._output}"
        with together(self._world, doing, patient=True):
            if self._display is not None:
                title = f"{self._config.model.architecture}, {self._config.optimizer.name}"
                picture = draw_loss(self._output, title)
                write_whole(self._output / SUMMARY, json.dumps(dict(summary)) + "\n")
                signals = draw_signals(self._output, title)
                self.note(f"curves in {picture}" + (f" and {signals}" if signals else ""))
