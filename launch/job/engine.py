"""The part of the job that computes: what engines have in common, and FSDP2's.

The loop in `trainer.py` knows an engine by the methods of `Engine` only. DeepSpeed's is in
`deepspeed_engine.py`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from conda_dist.launch.cluster.process_group import JobError, World
from conda_dist.launch.data.batches import Tokens
from conda_dist.launch.job import optimizers, schedule
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.finite import Origin
from conda_dist.launch.job.model import build_model, compute_dtype, parameter_count
from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.runtime.diagnostics import scalars
from conda_dist.runtime.dtensor import local


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: float  # mean over the global batch
    grad_norm: float  # norm of the global gradient before clipping
    lr: float  # learning rate of this step (the first group's)
    optimizer_s: float  # seconds this rank spent clipping and updating; see Stopwatch
    # None if the weights were updated, else where a number that is not finite came from.
    skipped: str | None = None


Take = Callable[[float, float], bool]
"""Is told the loss and the norm of the global gradient; says whether the step is to be taken."""


class Engine(ABC):
    """What the loop asks of an engine; every method is called on every rank."""

    def __init__(
        self,
        config: Config,
        world: World,
        network: Any,
        runs: Any,
        optimizers: Sequence[Optimizer],
        grouped: Sequence[Any],
    ) -> None:
        """Holds what the methods below need.

        Args:
            config: The job's.
            world: The job.
            network: The model from transformers.
            runs: What is called for a forward pass: the model, or what is around it.
            optimizers: All of them; diagnostics are the first one's, if it has some.
            grouped: Them, or what is around them: what has the parameter groups.
        """
        self._config, self._world = config, world
        self._network, self._runs = network, runs
        self._optimizers, self._grouped = optimizers, grouped
        self._peaks = [float(group["lr"]) for group in self._groups]
        self._origin = Origin(network.get_input_embeddings(), world.device)
        self._loss = torch.zeros((), device=world.device)  # of the global batch
        self._stopwatch = Stopwatch(world.device)
        self._step = 0  # steps taken
        self._collected = 0  # the step of the diagnostics that were last read

    @property
    def _groups(self) -> list[dict[str, Any]]:
        # A load makes new ones.
        return [group for each in self._grouped for group in each.param_groups]

    def describe(self) -> dict[str, str]:
        """Names and values that say what runs."""
        dtype = str(compute_dtype(self._config.training, self._world.device))
        return {
            "model": f"{self._config.model.architecture}, {parameter_count(self._network):,} "
            f"parameters, {dtype.removeprefix('torch.')} compute"
        }

    @abstractmethod
    def print_report(self) -> None:
        """Prints what the optimizer does with each parameter, where it can say; on one rank."""

    def forward_backward(self, micro_batches: Sequence[Tokens], tokens: int) -> None:
        """Adds up the gradients of the mean loss over the global batch.

        The host does not wait for the loss: `step` reads it together with the gradient's norm.

        Args:
            micro_batches: This rank's rows, (b, sequence_length + 1) each and possibly none; as
                many as on every other rank.
            tokens: Predicted tokens in the global batch, over all ranks.
        """
        total = torch.zeros((), device=self._world.device)
        self._origin.begin()
        for index, rows in enumerate(micro_batches):
            self._prepare(last=index == len(micro_batches) - 1)
            loss = loss_sum(self._runs, rows, self._world.device) / tokens
            self._backward(loss)
            total += loss.detach()
        self._origin.loss(total)
        dist.all_reduce(total)
        self._loss = total

    @abstractmethod
    def _prepare(self, *, last: bool) -> None:
        """Says whether the micro-batch that comes is the step's last."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the loss."""

    @abstractmethod
    def step(self, take: Take) -> StepResult:
        """Clips, updates the weights, advances the schedule and clears the gradients.

        Weights and optimizer state stay as they are if `take` says no, on every rank alike. It is
        asked once, and does not communicate.
        """

    def signals(self) -> dict[str, float]:
        """What the optimizer has collected in the last step, by name; {} if nothing."""
        optimizer: Any = self._optimizers[0]
        before, self._collected = self._collected, getattr(optimizer, "diagnostics_step", 0)
        return scalars(optimizer.diagnostics(summed=True)) if self._collected != before else {}

    def _set_rates(self) -> float:
        """Sets each group's learning rate for the step that comes; returns the first group's.

        A resumed run follows its own config, not the rates stored in the checkpoint.
        """
        steps, peak = self._config.training.steps, self._config.optimizer.chosen.lr
        factor = schedule.factor(self._config.schedule, peak, steps, self._step)
        for group, rate in zip(self._groups, self._peaks, strict=True):
            group["lr"] = rate * factor
        return self._peaks[0] * factor

    def _where(self) -> str:
        """Where a number that is not finite came from, in words; before gradients are cleared."""
        return self._origin.describe(self._world, self._network)

    def state_bytes(self) -> int:
        """Bytes of the optimizers' state on all ranks; every rank asks."""
        held = sum(map(self._held, self._optimizers))
        return int(add_up(torch.tensor(held, dtype=torch.int64, device=self._world.device)))

    def _held(self, optimizer: Optimizer) -> int:
        """Bytes of an optimizer's state on this rank."""
        leaves = tree_leaves(list(optimizer.state.values()))
        return sum(local(leaf).nbytes for leaf in leaves if isinstance(leaf, Tensor))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Tokens], tokens: int) -> float:
        """Mean loss per token over rows spread across the ranks; arguments as above."""
        self._runs.eval()
        total = torch.zeros((), device=self._world.device, dtype=torch.float64)
        for rows in micro_batches:
            total += loss_sum(self._runs, rows, self._world.device)
        self._runs.train()
        return add_up(total) / tokens

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state into an existing folder.

        Raises JobError on every rank, if it failed on any.
        """

    @abstractmethod
    def load(self, folder: Path, step: int) -> None:
        """Takes over what `save` wrote after `step` steps; raises like it."""


class Fsdp2Engine(Engine):
    """A model sharded with FSDP2 and the torch optimizers that train it."""

    def __init__(self, config: Config, vocab_size: int, world: World) -> None:
        """Builds everything at step 0; raises ConfigError for settings of the optimizer."""
        training = config.training
        if not config.optimizer.chosen.knows_shards:
            training = training.model_copy(update={"hsdp_replicas": world.size})
        self.model = build_model(config.model, training, vocab_size, world)
        try:
            made = optimizers.build_optimizers(self.model, config.optimizer)
        except ValueError as error:
            raise ConfigError(f"optimizer.{config.optimizer.name}: {error}") from error
        super().__init__(config, world, self.model, self.model, made, made)

    def describe(self) -> dict[str, str]:
        """See Engine."""
        found = {**super().describe(), "optimizer": optimizers.describe(self._optimizers)}
        if not self._config.optimizer.chosen.knows_shards:
            name = type(self._optimizers[0]).__name__
            found["layout"] = f"each rank has the whole model, because {name} knows no shards"
        return found

    def print_report(self) -> None:
        """See Engine."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, MatrixOptimizer):
                optimizer.report()

    def _prepare(self, *, last: bool) -> None:
        # Unless memory is short, gradients are reduced once per step, and the weights stay
        # unsharded from one micro-batch to the next.
        model, each = cast(FSDPModule, self.model), self._config.training.lean_accumulation
        model.set_requires_gradient_sync(last or each)
        model.set_reshard_after_backward(last or each)

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, take: Take) -> StepResult:
        """See Engine."""
        settings = self._config.optimizer.chosen
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # The one time in a step that the host waits for the device.
        loss, grad_norm = torch.stack([self._loss, norm.to(self._loss)]).tolist()
        skipped = None if take(loss, grad_norm) else self._where()
        lr = self._set_rates()
        with self._stopwatch:
            if settings.grad_clip and skipped is None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.model.parameters(), settings.grad_clip, norm
                )
            self._step += 1
            for optimizer in self._optimizers:
                if skipped is None:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, lr, self._stopwatch.seconds, skipped)

    def save(self, folder: Path) -> None:
        """See Engine. Hyperparameters are not saved: they are the config's."""
        model, optimizer = get_state_dict(self.model, self._optimizers)
        state = {"model": model, "optimizer": optimizer["state"]}
        with _one_error(f"saving to {folder}"):
            save(state, checkpoint_id=folder, process_group=self._world.control)

    def load(self, folder: Path, step: int) -> None:
        """See Engine."""
        model, optimizer = get_state_dict(self.model, self._optimizers)
        state = {"model": model, "optimizer": optimizer["state"]}
        with _one_error(f"loading {folder}"):
            load(state, checkpoint_id=folder, process_group=self._world.control)
        set_state_dict(
            self.model, self._optimizers, model_state_dict=model, optim_state_dict=optimizer
        )
        for group in self._groups:
            if "step" in group:  # SOAP counts there
                group["step"] = step
        self._step = step


@contextmanager
def _one_error(doing: str) -> Iterator[None]:
    """Turns torch's error, which every rank gets, into a JobError with the causes on all ranks."""
    try:
        yield
    except CheckpointException as error:
        causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise JobError(f"{doing} failed: {'; '.join(sorted(causes))}") from error


def loss_sum(model: nn.Module, rows: Tokens, device: torch.device) -> Tensor:
    """Summed cross-entropy of (b, sequence_length + 1) tokens, in float32."""
    empty = len(rows) == 0
    if empty:
        # Sharded models communicate in every forward pass, so a rank without rows runs one as
        # well; its sum is multiplied by zero.
        tokens = torch.zeros((1, rows.shape[1]), dtype=torch.int64, device=device)
    elif device.type == "cuda":
        # From memory that is not pinned, a copy waits for all that the device has to do.
        tokens = torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)
    else:
        tokens = torch.from_numpy(rows)
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    return loss * 0.0 if empty else loss


def add_up(total: Tensor) -> float:
    """The sum of all ranks' numbers."""
    dist.all_reduce(total)
    return float(total)


class Stopwatch:
    """A context that measures the seconds of what is in it.

    On a GPU these are the device's, and the host does not wait for them: they are read when the
    context is entered the next time, by when the host has waited for the loss of that step.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        """Of the last time; on a GPU, of the last but one."""
        self._start = 0.0
        both = range(2 if device.type == "cuda" else 0)
        self._events = [torch.Event(device, enable_timing=True) for _ in both]
        self._used = False

    def __enter__(self) -> None:
        if self._events:
            start, end = self._events
            if self._used:
                end.synchronize()  # which is over, where the host has read the loss
                self.seconds = start.elapsed_time(end) / 1000
            start.record()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events[1].record()
            self._used = True
        else:
            self.seconds = time.perf_counter() - self._start
