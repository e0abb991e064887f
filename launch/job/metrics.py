"""The numbers of a run: measured per step, kept in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conda_dist.launch.job.files import METRICS


@dataclass(frozen=True, slots=True)
class Record:
    """One line of metrics.jsonl; times and rates are means over the steps since the line before."""

    step: int  # steps taken so far
    loss: float  # training loss of this step, mean per token over the global batch
    lr: float
    # Norm of the global gradient before clipping. It and the loss are null in the file if they are
    # not finite.
    grad_norm: float
    val_loss: float | None  # validation loss after this step, where it was measured
    skipped: int  # steps so far that were not taken, being bad
    tokens: int  # tokens trained on so far
    tokens_per_s: float  # tokens of all ranks per second of training
    step_s: float  # seconds per step
    optimizer_s: float  # seconds per step in the optimizer, part of step_s
    train_s: float  # seconds of training so far, without validation, saving and stops
    # The optimizer's diagnostics by path, as "conda/staleness", where this step collected some; in
    # the files beside the other numbers.
    signals: Mapping[str, float] = field(default_factory=dict)


class Meter:
    """Adds up steps between two records."""

    def __init__(self, tokens_per_step: int, train_s: float) -> None:
        """Starts with `train_s` seconds of training already behind it."""
        self._tokens_per_step = tokens_per_step
        self.train_s = train_s
        self._clear()

    def add(self, seconds: float, optimizer_s: float) -> None:
        """Notes one step's seconds, and those of them spent in the optimizer."""
        self._steps += 1
        self._seconds += seconds
        self._optimizer_s += optimizer_s
        self.train_s += seconds

    def record(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        val_loss: float | None,
        skipped: int,
        signals: Mapping[str, float] | None = None,
    ) -> Record:
        """The record after `step`, with means since the last record."""
        record = Record(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            val_loss=val_loss,
            skipped=skipped,
            tokens=step * self._tokens_per_step,
            tokens_per_s=self._steps * self._tokens_per_step / self._seconds,
            step_s=self._seconds / self._steps,
            optimizer_s=self._optimizer_s / self._steps,
            train_s=self.train_s,
            signals=signals or {},
        )
        self._clear()
        return record

    def _clear(self) -> None:
        self._steps, self._seconds, self._optimizer_s = 0, 0.0, 0.0


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard; one process of the job has one."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        """Opens the files to continue after `step`, dropping what a run wrote beyond it.

        A run that was killed between two checkpoints has reported steps that its resume takes
        again.
        """
        path = folder / METRICS
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, path)
        self._file = path.open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Appends one record."""
        values = asdict(record)
        values |= values.pop("signals")
        for name in ("loss", "grad_norm", *record.signals):  # JSON has no word for them
            if not math.isfinite(values[name]):
                values[name] = None
        self._file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flushes and closes the files."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
