"""Layer: integrations. What DeepSpeed's checkpoints hold of Conda, and whether it fits.

An optimizer's state dict has under "conda" what torch's loader would cast or drop: the bases and
the counts. Universal checkpoints are made of one rank's parameter groups and of tensors as long as
the partitions; so the first rank's first group has the same once more, with whole bases of all
weights, and ``ds_to_universal`` carries it along without knowing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from conda_dist.integrations.deepspeed.partitions import Member
from conda_dist.routing import CONDA

KEY, FORMAT = "conda", 1

Weights: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By name of a weight its ``step``, ``basis`` and ``basis_step``."""


@dataclass(slots=True)
class Kept:
    """What was kept beside the tensors that DeepSpeed stores.

    Attributes:
        weights: by name of a weight its ``step``, its ``basis``, as a rank has it or whole, and
            its ``basis_step``.
        counts: by name of a parameter the steps that the engine's tensor with it has taken; empty
            if the engine has kept them.
    """

    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


def pack(
    kept: Kept, groups: Sequence[Mapping[str, Any]], members: Mapping[Tensor, Member]
) -> dict[str, Any]:
    """The part of a state dict that torch's loader would cast or drop.

    Args:
        kept: what is kept of the parameters.
        groups: the parameter groups of the state dict.
        members: the parameters.
    """
    return {
        "format": FORMAT,
        "shapes": {name: list(shape) for name, shape in _matrices(members).items()},
        "weights": {name: dict(tensors) for name, tensors in kept.weights.items()},
        "counts": kept.counts,
        "others": {m.name: list(m.shape) for m in members.values() if m.algorithm != CONDA},
        "groups": [hyperparameters(group) for group in groups],
    }


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters and without what was kept."""
    return {key: value for key, value in group.items() if key not in ("params", KEY)}


def restore(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Gives a group saved hyperparameters, in place: engine and schedulers hold on to it."""
    for key in group.keys() - saved.keys() - {"params"}:
        del group[key]
    group.update(hyperparameters(saved))
    group["betas"] = tuple(group["betas"])


def check(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    members: Mapping[Tensor, Member],
) -> Kept:
    """Holds a state dict against the optimizer that is to load it.

    Returns:
        What was kept of its weights.

    Raises:
        ValueError: it does not fit.
    """
    kept = _check_kept(state_dict.get(KEY), members)
    for index, (tensor, saved) in enumerate(states(state_dict, groups)):
        for name in ("exp_avg", "exp_avg_sq") if saved else ():
            if name not in saved or saved[name].shape != tensor.shape:
                found = tuple(saved[name].shape) if name in saved else "nothing"
                raise ValueError(
                    f"{name} of tensor {index}: the checkpoint has {found}, here it is "
                    f"{tuple(tensor.shape)}; load it on as many ranks, with the same config"
                )
    return Kept(kept["weights"])


def _matrices(members: Mapping[Tensor, Member]) -> dict[str, tuple[int, ...]]:
    """Shapes of what has bases, by name."""
    conda = (member for member in members.values() if member.algorithm == CONDA)
    return {part.name: part.shape for member in conda for part in member.parts}


def _check_kept(extra: Any, members: Mapping[Tensor, Member]) -> Mapping[str, Any]:
    if not isinstance(extra, Mapping) or extra.get("format") != FORMAT:
        raise ValueError(
            "the checkpoint's optimizer state was not written by Conda under DeepSpeed, or by "
            "another version of it; load the model alone with load_optimizer_states=False"
        )
    ours = _matrices(members)
    _compare(ours, extra["shapes"], " on the conda path")
    if extra["weights"] and (missing := ours.keys() - extra["weights"].keys()):
        raise ValueError(f"{min(missing)}: the checkpoint has no basis of it")
    return extra


def _compare(
    ours: Mapping[str, tuple[int, ...]], saved: Mapping[str, Sequence[int]], where: str
) -> None:
    theirs = {name: tuple(shape) for name, shape in saved.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name}: the checkpoint has {theirs.get(name, 'nothing')}{where}, "
                f"here it is {ours.get(name, 'nothing')}"
            )


def read_universal(
    folder: str, groups: Sequence[Mapping[str, Any]], members: Mapping[Tensor, Member]
) -> Mapping[str, Any]:
    """What a universal checkpoint has kept, held against the optimizer that is to load it.

    Args:
        folder: of the checkpoint, with its tag.
        groups: the optimizer's parameter groups.
        members: its parameters.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    path = os.path.join(folder, "zero", "optimizer_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: {folder} is not what ds_to_universal makes")
    # Mapped, for it holds the bases of all weights, of which a rank takes few.
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        read = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    extra = (read.get("param_groups") or [{}])[0].get(KEY)
    if isinstance(extra, Mapping) and "unfit" in extra:
        raise ValueError(f"the universal checkpoint cannot be loaded: {extra['unfit']}")
    kept = _check_kept(extra, members)
    ours = {m.name: m.shape for m in members.values() if m.algorithm != CONDA}
    _compare(ours, kept["others"], "")
    if len(kept["groups"]) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(kept['groups'])} parameter groups, the optimizer "
            f"{len(groups)}"
        )
    return kept


def states(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Every tensor of the groups with what was saved of its state; empty if nothing was.

    Raises:
        ValueError: there are other groups or tensors in the state dict.
    """
    saved = state_dict["param_groups"]
    counts = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in saved] != counts:
        raise ValueError(
            f"the checkpoint has {[len(group['params']) for group in saved]} tensors in its "
            f"parameter groups, the optimizer {counts}"
        )
    for group, theirs in zip(groups, saved, strict=True):
        for tensor, index in zip(group["params"], theirs["params"], strict=True):
            yield tensor, state_dict["state"].get(index, {})
