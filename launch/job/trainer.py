"""The loop: batches in, engine steps, validation, checkpoints, a clean stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conda_dist.bad_steps import BadSteps
from conda_dist.launch.cluster import process_group
from conda_dist.launch.cluster.process_group import JobError, World
from conda_dist.launch.cluster.signals import StopRequest
from conda_dist.launch.data.batches import Tokens, micro_batches, row_range
from conda_dist.launch.data.preparation import Data
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import Checkpoints
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.engine import Engine, StepResult
from conda_dist.launch.job.metrics import Meter
from conda_dist.launch.job.report import Reporter
from conda_dist.launch.job.watchdog import Watchdog

# A checkpoint's tensors or data position would mean something else under other values of these.
_IDENTITY = (
    "engine",
    "model.",
    "optimizer.name",
    "training.seed",
    "training.sequence_length",
    "training.global_batch_size",
)
# These say where and how a job is started, not what it computes.
_INCIDENTAL = ("output", "resume", "data.cache")


class BadStepsError(JobError):
    """There were more bad steps in a row than may be skipped; they updated nothing."""


class Trainer:
    """One run: where it stands, and how it goes on from there."""

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        data: Data,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
    ) -> None:
        """Starts at step 0; `resume` moves to where a checkpoint stood."""
        self._config, self._world = config, world
        self._engine, self._data, self._checkpoints = engine, data, checkpoints
        self._watchdog = watchdog
        training = config.training
        self._tokens = training.global_batch_size * training.sequence_length
        self._meter = Meter(self._tokens, train_s=0.0)
        self._bad = BadSteps(training.skip_limit, training.skip_factor, training.skip_window)
        self._val_loss: float | None = None
        self._saved_at = 0
        self.step = 0
        """Steps taken."""

    def resume(self, path: Path, facts: dict[str, Any]) -> list[str]:
        """Takes over a checkpoint whose facts `require_same` has accepted; returns notes on it.

        Raises ConfigError on every rank if it is of other data, CheckpointError if it is damaged.
        """
        if facts["fingerprint"] != self._data.fingerprint:
            raise ConfigError(
                f"{path} was trained on other data: the text or the tokenizer has changed since"
            )
        try:
            self._engine.load(path, facts["step"])
        except JobError as error:
            raise self._checkpoints.unusable(path, str(error)) from error
        self.step = self._saved_at = facts["step"]
        self._meter.train_s, self._val_loss = facts["train_s"], facts["val_loss"]
        self._bad.load_state_dict(facts["bad_steps"])
        abandoned = self._checkpoints.abandon_after(self.step)
        return [f"set aside, being of a later step: {folder}" for folder in abandoned]

    def train(self, reporter: Reporter, stop: StopRequest) -> bool:
        """Trains to the last step; returns False if asked to stop before.

        Raises JobError on every rank: too many steps were bad, a checkpoint or the metrics could
        not be saved, or data not be read.
        """
        training, saving = self._config.training, self._config.checkpoint.interval
        while self.step < training.steps:
            started = time.perf_counter()
            asked, lost = bool(stop), reporter.failed
            # One that was asked to stop has little time: it does not wait for data that it leaves.
            rows, error = self._read() if not asked and not lost else (None, None)
            self._watchdog.mark(self.step, "between steps")
            stopping, failed, unread = process_group.any_rank(
                self._world, asked, lost, error is not None
            )
            if stopping or failed or unread:
                self._save(reporter)
                reporter.require_written()
                if unread and not stopping:  # a host that goes away may lose its network first
                    what = f"reading the data of step {self.step + 1}"
                    with process_group.together(self._world, what):
                        if error is not None:
                            raise error
                return False
            assert rows is not None
            result = self._train_step(rows, reporter)
            self._meter.add(time.perf_counter() - started, result.optimizer_s)
            val_loss = None
            if self.step % training.val_interval == 0 or self.step == training.steps:
                val_loss = self._val_loss = self._validate()
            self._watchdog.mark(self.step, "writing metrics")
            signals = self._engine.signals()
            due = self.step % self._config.metrics.interval == 0
            if due or val_loss is not None or signals:
                record = self._meter.record(
                    self.step,
                    loss=result.loss,
                    lr=result.lr,
                    grad_norm=result.grad_norm,
                    val_loss=val_loss,
                    skipped=self._bad.total,
                    signals=signals,
                )
                reporter.record(record)
            if saving and self.step % saving == 0:
                self._save(reporter)
        self._save(reporter)
        reporter.require_written()
        return True

    def summary(self) -> dict[str, Any]:
        """Where the run stands: step, last validation loss, seconds of training."""
        return {"step": self.step, "val_loss": self._val_loss, "train_s": self._meter.train_s}

    def _read(self) -> tuple[Tokens | None, Exception | None]:
        """This rank's rows of the next global batch, or what kept it from reading them."""
        training, world = self._config.training, self._world
        share = row_range(training.global_batch_size, world.rank, world.size)
        self._watchdog.mark(self.step + 1, "reading data")
        try:
            return self._data.batches.rows(self.step, *share), None
        except Exception as error:  # the other ranks are waiting: tell them first
            return None, error

    def _train_step(self, rows: Tokens, reporter: Reporter) -> StepResult:
        """One step on this rank's rows."""
        training, world = self._config.training, self._world
        # Random numbers (dropout's) depend on the step and the rank alone: no generator state to
        # save, and a resume draws what the uninterrupted run would have drawn.
        seed = np.random.SeedSequence([training.seed, self.step, world.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        most = -(-training.global_batch_size // world.size)
        parts = micro_batches(rows, most, training.micro_batch_size)
        self._watchdog.mark(self.step + 1, "forward and backward")
        self._engine.forward_backward(parts, self._tokens)
        self._watchdog.mark(self.step + 1, "optimizer step")
        wrong = ""

        def take(loss: float, norm: float) -> bool:
            nonlocal wrong
            wrong = self._bad.judge({"the loss": loss, "the gradient's norm": norm})
            return not wrong

        result = self._engine.step(take)
        if wrong:
            finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
            where = "" if finite else f" ({result.skipped})"
            bad = f"{self._bad.describe()} (training.skip_limit)"
            what = f"step {self.step + 1}: {wrong}{where}; {bad}"
            if self._bad.too_many:
                newest = self._checkpoints.newest() or "none yet"
                raise BadStepsError(
                    f"{what}. Nothing was updated; the newest checkpoint: {newest}. A lower "
                    "optimizer.lr or an optimizer.grad_clip may help"
                )
            reporter.note(f"skipped {what}")
        self.step += 1
        return result

    def _validate(self) -> float:
        """Mean loss per token over the validation set, spread over the ranks."""
        self._watchdog.mark(self.step, "validation")
        rows, world, training = self._data.validation, self._world, self._config.training
        first, last = (rank * len(rows) // world.size for rank in (world.rank, world.rank + 1))
        most = -(-len(rows) // world.size)
        parts = micro_batches(rows[first:last], most, training.micro_batch_size)
        return self._engine.evaluate(parts, len(rows) * training.sequence_length)

    def _save(self, reporter: Reporter) -> None:
        """Saves the whole state, once per step."""
        if self._saved_at == self.step:
            return
        self._watchdog.mark(self.step, "saving a checkpoint")
        facts = {
            **self.summary(),
            "bad_steps": self._bad.state_dict(),
            "fingerprint": self._data.fingerprint,
            "config": options.to_json(self._config),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }
        path = self._checkpoints.save(self.step, facts, self._engine.save)
        self._saved_at = self.step
        reporter.note(f"saved {path}")


def require_same(path: Path, facts: dict[str, Any], config: Config) -> list[str]:
    """Notes on settings that have changed since a checkpoint, which the run follows from here on.

    Raises:
        ConfigError: It is of another model, optimizer or order of the data.
    """
    # A key that the checkpoint does not know came later; it did then what it does by default.
    saved = options.to_json(Config()) | facts["config"]
    current = options.to_json(config)
    changed = {
        name: f"{name} ({value} there, {current.get(name, 'unknown')} here)"
        for name, value in saved.items()
        if value != current.get(name) and name not in _INCIDENTAL
    }
    vital = [text for name, text in changed.items() if name.startswith(_IDENTITY)]
    if vital:
        raise ConfigError(f"{path} was made with another {', '.join(vital)}")
    return [f"changed since the checkpoint: {text}" for text in changed.values()]
