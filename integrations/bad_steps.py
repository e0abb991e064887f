"""Skips bad steps in Hugging Face's ``Trainer``, and in the trainers of TRL made from it."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from conda_dist.bad_steps import BadSteps

_log = logging.getLogger(__name__)
_SAVED = "conda_dist.bad_steps"
"""Where the Trainer's state, which is in its checkpoints, has that of a run."""


def skip_bad_steps(
    trainer: Trainer, *, limit: int = 3, factor: float = 0.0, window: int = 100
) -> "SkipBadSteps":
    """Has a Trainer skip steps whose gradient is not finite, or larger than before by far.

    Call it before ``train``. In a skipped step no parameter has a gradient, so that weights and
    optimizer state stay as they are; data and schedule go on. All ranks decide alike, from the
    gradient norm that the Trainer computes, before clipping. The losses of ranks differ, so they
    decide nothing. ``skipped_steps`` is among what the Trainer logs. Counts and norms are in its
    checkpoints, and go on from there.

    The host waits for the norm in each step. By default it waits there for the loss already
    (``logging_nan_inf_filter``).

    With float16, steps that are not finite are left to the gradient scaler: they are not counted,
    and no number of them ends the training.

    Args:
        trainer: works in one process, under DDP and under FSDP2.
        limit: bad steps in a row that are skipped; then training raises a RuntimeError.
        factor: see :class:`conda_dist.bad_steps.BadSteps`; 0: only what is not finite is skipped.
        window: see there.

    Returns:
        The callback, which is in the Trainer already.

    Raises:
        ValueError: an argument is out of bounds, or the Trainer runs DeepSpeed: Accelerate steps
            its engine at the end of the backward pass, before anybody can say no.
    """
    callback = SkipBadSteps(trainer, BadSteps(limit, factor, window))
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())  # so that all loggers see what it logs
    return callback


class SkipBadSteps(TrainerCallback):  # type: ignore[misc]
    """What :func:`skip_bad_steps` adds to a Trainer.

    A callback of the Trainer is not told the gradient norm and cannot stop a step. So this one
    stands before the method of the Trainer's accelerator that computes the norm, and removes the
    gradients.
    """

    def __init__(self, trainer: Trainer, bad: BadSteps) -> None:
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "skip_bad_steps does not work under DeepSpeed, which takes its step before the "
                "Trainer knows the gradient's norm. ZeRO itself skips steps that are not finite: "
                'in float32 and float16, and in bfloat16 with "bf16": {"check_grad_overflow": true}'
            )
        self._bad, self._step, self._judged = bad, 0, False
        self._accelerator = trainer.accelerator
        self._clip = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = self._clip_or_skip

    @property
    def skipped(self) -> int:
        """Steps skipped so far."""
        return self._bad.total

    def _clip_or_skip(
        self, parameters: Iterable[torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Clips, and removes the gradients if the norm says that the step is bad.

        Raises:
            RuntimeError: there were too many in a row.
        """
        parameters, self._judged = list(parameters), True
        norm: torch.Tensor = self._clip(parameters, *args, **kwargs)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self._accelerator.scaler is not None and not math.isfinite(value):
            return norm
        wrong = self._bad.judge({"the gradient's norm": value})
        if not wrong:
            return norm
        what = f"step {self._step + 1}: {wrong}; {self._bad.describe()}"
        if self._bad.too_many:
            raise RuntimeError(
                f"{what}. Nothing was updated. A lower learning_rate or max_grad_norm may help"
            )
        if self._accelerator.is_main_process:
            _log.warning("skipped %s", what)
        for parameter in parameters:
            parameter.grad = None
        return norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on where the checkpoint stood from which the Trainer resumes, else begins anew."""
        self._step, self._judged = state.global_step, False
        self._bad.load_state_dict(state.stateful_callbacks.get(_SAVED, BadSteps().state_dict()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes sure that the step was judged.

        Raises:
            RuntimeError: the Trainer did not compute the norm by the accelerator that it had when
                :func:`skip_bad_steps` was called.
        """
        if not self._judged:
            raise RuntimeError(
                f"step {self._step + 1}: skip_bad_steps cannot judge it, because the Trainer did "
                "not compute the gradient's norm by the accelerator that it was made with: it has "
                "another one (hyperparameter_search), or its parameters are on several device "
                "meshes. Nothing was updated. Train without skip_bad_steps"
            )
        self._judged = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts counts and norms where the Trainer's checkpoints have them."""
        self._step = state.global_step
        state.stateful_callbacks[_SAVED] = self._bad.state_dict()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Adds the number of skipped steps to what is logged."""
        if "loss" in logs:
            logs["skipped_steps"] = state.log_history[-1]["skipped_steps"] = self._bad.total
