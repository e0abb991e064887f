"""Conda in Hugging Face's ``Trainer``, and in the trainers of TRL that are made from it.

``Trainer(model, args, optimizer_cls_and_kwargs=conda_for_trainer(args), ...)`` works in one
process, under DDP, under FSDP2 and under DeepSpeed. The Trainer refuses ``optimizers=`` under FSDP,
and ignores it under DeepSpeed.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from conda_dist import Conda, param_groups
from conda_dist.runtime.diagnostics import scalars

Group = dict[str, Any]


def conda_for_trainer(
    args: TrainingArguments,
    *,
    conda_params: Sequence[str] = (),
    adamw_params: Sequence[str] = (),
    splits: Mapping[str, int | Sequence[int]] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns what the Trainer takes as ``optimizer_cls_and_kwargs``.

    The Trainer makes the optimizer with it when training starts. Embeddings, head, norms and biases
    take the adamw path, as in :func:`conda_dist.param_groups`. Parameters that are not trained,
    such as the base model's under PEFT, are left out. LoRA's A and B take the conda path if their
    rank is 2 or more.

    **Rates.** ``args.learning_rate`` is the rate of both paths, and the Trainer's scheduler starts
    from it. With ``**from_adamw()`` (see :func:`conda_dist.from_adamw`) it is a rate that was tuned
    for AdamW in pretraining. For fine-tuning, start from AdamW's rate with ``scale=1.0``.

    Args:
        args: the Trainer's arguments, for ``learning_rate`` and ``weight_decay``. The decay is that
            of the Trainer: ``Trainer.get_decay_parameter_names`` leaves out biases and norms. The
            ``optim`` and ``adam_*`` arguments have no effect.
        conda_params: patterns of names of parameters to put on the conda path in any case; see
            ``conda`` of :func:`conda_dist.param_groups`.
        adamw_params: patterns of names of parameters to put on the adamw path.
        splits: the rows of the parts of fused weights; see :func:`conda_dist.param_groups`.
        options: arguments of :class:`conda_dist.Conda`. ``lr`` and ``weight_decay`` replace those
            of ``args``. DeepSpeed's takes no ``process_group``; under DDP it is all ranks' group.

    Raises:
        TypeError: an option is not one of Conda's.
        ValueError: ``args.learning_rate`` is the default of its class, which was chosen for AdamW
            (5e-5 in ``TrainingArguments``), and there is no ``lr`` and no ``scale`` in ``options``.
    """
    inspect.signature(Conda).bind([], **options)
    _rate(args, options)
    own = {"conda_params": conda_params, "adamw_params": adamw_params, "splits": splits or {}}
    return CondaFactory, {"args": args, **own, **options}


class CondaFactory:
    """Makes the optimizer. The Trainer makes an instance of it and calls that with the model."""

    def __call__(
        self,
        model: nn.Module,
        *_: TrainingArguments,
        args: TrainingArguments,
        conda_params: Sequence[str],
        adamw_params: Sequence[str],
        splits: Mapping[str, int | Sequence[int]],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Makes the optimizer of a model; see :func:`conda_for_trainer`.

        Axolotl's trainer passes its arguments after the model, too; they are those of ``args``.

        Raises:
            ValueError: FSDP1 is used; or see :func:`conda_dist.param_groups`.
        """
        decay = options.pop("weight_decay", args.weight_decay)
        options = {**options, "lr": _rate(args, options)}
        state = AcceleratorState()
        if getattr(state, "deepspeed_plugin", None) is not None:
            from conda_dist.integrations import deepspeed

            patterns = {"conda_params": list(conda_params), "adamw_params": list(adamw_params)}
            named = {"params": list(model.named_parameters())}
            groups = _by_decay(model, [named], decay)
            return deepspeed.Conda(groups, **patterns, splits=dict(splits), **options)
        if getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
            raise ValueError(
                "Conda does not support FSDP1, whose parameters are flat. Use FSDP2: "
                'TrainingArguments(fsdp_config={"version": 2, ...}).'
            )
        groups = param_groups(model, conda=conda_params, adamw=adamw_params, splits=splits)
        if _is_replicated(model, state):
            options.setdefault("process_group", dist.group.WORLD)
        return Conda(_by_decay(model, groups, decay), **options)


class DiagnosticsCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the optimizer's diagnostics by path, such as "conda/staleness", where the Trainer logs.

    ``trainer.add_callback(DiagnosticsCallback(trainer))``, with ``diagnostics_every`` among the
    options of :func:`conda_for_trainer`. A step that collects is logged at its end.

    Args:
        trainer: the Trainer, for its ``log``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._logged = trainer, 0

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Logs what the step has collected, if it has."""
        while optimizer is not None and not hasattr(optimizer, "diagnostics_step"):
            optimizer = getattr(optimizer, "optimizer", None)  # Accelerate and DeepSpeed wrap it
        before, self._logged = self._logged, getattr(optimizer, "diagnostics_step", 0)
        if self._logged not in (before, 0):
            self._trainer.log(scalars(optimizer.diagnostics(summed=True)))


def _rate(args: TrainingArguments, options: Mapping[str, Any]) -> Any:
    """The learning rate.

    Raises:
        ValueError: it is the default of the arguments' class, and ``options`` have no ``scale``.
    """
    if "lr" in options:
        return options["lr"]
    default = next(field.default for field in fields(args) if field.name == "learning_rate")
    if args.learning_rate == default and "scale" not in options:
        raise ValueError(
            f"learning_rate: {default} is the default of {type(args).__name__}, which was chosen "
            "for AdamW, and Conda's scale of 0.25 was not. For a rate of AdamW's, give "
            "conda_for_trainer(args, scale=1.0), or **conda_dist.from_adamw() when pretraining; "
            "else set another learning_rate."
        )
    return args.learning_rate


def _is_replicated(model: nn.Module, state: AcceleratorState) -> bool:
    """Whether all ranks have equal parameters and gradients, as under DDP."""
    if not dist.is_initialized() or getattr(state, "fsdp_plugin", None) is not None:
        return False
    return not any(isinstance(param, DTensor) for param in model.parameters())


def _by_decay(model: nn.Module, groups: list[Group], decay: float) -> list[Group]:
    """Splits groups of named parameters into those that decay and those that do not.

    Parameters that are not trained are left out, as the Trainer does.
    """
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    found = []
    for group in groups:
        named = [(name, param) for name, param in group["params"] if param.requires_grad]
        for decays in (True, False):
            inside = [pair for pair in named if (pair[0] in decaying) == decays]
            own = {**group, "params": inside, "weight_decay": decay if decays else 0.0}
            found += [own] if inside else []
    return found
