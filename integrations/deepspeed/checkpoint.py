"""Layer: integrations. Conda's part of DeepSpeed's checkpoints, and checks before it is loaded.

The optimizer's state dict has a key "conda" for what torch's loader would cast or drop: the bases
and the counts. A universal checkpoint consists of one rank's parameter groups and of tensors in the
shapes of parameters, so it has no place for bases. Therefore the first rank's first parameter group
has such a key, too, with the whole bases of all weights, and ``ds_to_universal`` copies the group.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from conda_dist.integrations.deepspeed.partitions import ParameterInfo
from conda_dist.routing import CONDA
from conda_dist.rules.conda import CondaBase
from conda_dist.rules.rule import Rule

KEY, FORMAT = "conda", 1

Infos: TypeAlias = Mapping[Tensor, ParameterInfo]
"""The optimizer's parameters."""


@dataclass(slots=True)
class SavedBases:
    """Saved states that DeepSpeed itself does not store.

    Attributes:
        weights: by name of a weight, its states of :func:`saved_keys`. A basis is whole (r, r), or
            has this rank's elements only.
        counts: by name of a parameter: the number of steps of the engine's tensor that contains it;
            empty if the engine stores the counts.
    """

    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


def saved_keys(rule: Rule, m: int, n: int) -> tuple[str, ...]:
    """The states of a matrix (m, n) that DeepSpeed's checkpoints lack: all but the moments."""
    specs = rule.states(m, n, torch.float32)
    return ("step", *rule.counts, *(name for name, spec in specs.items() if not spec.cut))


def pack(bases: SavedBases, groups: Sequence[Mapping[str, Any]], infos: Infos) -> dict[str, Any]:
    """The value of a state dict's key "conda".

    Args:
        bases: bases and counts of the parameters.
        groups: the parameter groups of the state dict.
        infos: the parameters.
    """
    return {
        "format": FORMAT,
        "shapes": {name: list(shape) for name, shape in _matrix_shapes(infos).items()},
        "weights": {name: dict(tensors) for name, tensors in bases.weights.items()},
        "counts": bases.counts,
        "others": {i.name: list(i.shape) for i in infos.values() if i.algorithm != CONDA},
        "groups": [hyperparameters(group) for group in groups],
    }


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters and without the key "conda"."""
    return {key: value for key, value in group.items() if key not in ("params", KEY)}


def restore_hyperparameters(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Puts saved hyperparameters into a group, in place: engine and schedulers refer to it.

    Options that are newer than the checkpoint stay as they are.
    """
    for key in group.keys() - saved.keys() - {"params", *CondaBase.added}:
        del group[key]
    group.update(hyperparameters(saved))
    group["betas"] = tuple(group["betas"])


def check(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], infos: Infos, rule: Rule
) -> SavedBases:
    """Checks that a state dict fits the optimizer that loads it.

    Args:
        state_dict: the state dict.
        groups: the optimizer's parameter groups.
        infos: its parameters.
        rule: the rule that steps its weights.

    Returns:
        The saved bases. The counts are empty, because the engine stores them.

    Raises:
        ValueError: it does not fit.
    """
    packed = _check_packed(state_dict.get(KEY), infos, rule)
    for index, (tensor, saved) in enumerate(saved_states(state_dict, groups)):
        for name in ("exp_avg", "exp_avg_sq") if saved else ():
            if name not in saved or saved[name].shape != tensor.shape:
                found = tuple(saved[name].shape) if name in saved else "nothing"
                raise ValueError(
                    f"{name} of tensor {index}: the checkpoint has {found}, here it is "
                    f"{tuple(tensor.shape)}; load it on as many ranks, with the same config"
                )
    return SavedBases(packed["weights"])


def _matrix_shapes(infos: Infos) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters and parts that have a basis, by name."""
    conda = (info for info in infos.values() if info.algorithm == CONDA)
    return {part.name: part.shape for info in conda for part in info.parts}


def _check_packed(packed: Any, infos: Infos, rule: Rule) -> Mapping[str, Any]:
    """Checks what :func:`pack` wrote, and returns it."""
    if not isinstance(packed, Mapping) or packed.get("format") != FORMAT:
        raise ValueError(
            "the checkpoint's optimizer state was not written by Conda under DeepSpeed, or by "
            "another version of it; load the model alone with load_optimizer_states=False"
        )
    ours = _matrix_shapes(infos)
    _compare_shapes(ours, packed["shapes"], " on the conda path")
    if packed["weights"] and (missing := ours.keys() - packed["weights"].keys()):
        raise ValueError(
            f"{min(missing)}: the checkpoint has no basis of it, and so is damaged; load the model "
            "alone with load_optimizer_states=False"
        )
    for name, saved in packed["weights"].items():
        wanted = {*saved_keys(rule, *ours[name][-2:])}
        if saved.keys() != wanted:
            raise ValueError(
                f"{name}: the checkpoint has {', '.join(sorted(saved))}, here it has "
                f"{', '.join(sorted(wanted))}; give the basis_source that it was saved with, or "
                "load the model alone with load_optimizer_states=False"
            )
    return packed


def _compare_shapes(
    ours: Mapping[str, tuple[int, ...]], saved: Mapping[str, Sequence[int]], where: str
) -> None:
    """Refuses shapes, by name, that differ from the saved ones; ``where``: put after a shape."""
    theirs = {name: tuple(shape) for name, shape in saved.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name}: the checkpoint has {theirs.get(name, 'nothing')}{where}, "
                f"here it is {ours.get(name, 'nothing')}"
            )


def read_universal(
    folder: str, groups: Sequence[Mapping[str, Any]], infos: Infos, rule: Rule
) -> Mapping[str, Any]:
    """Reads the key "conda" of a universal checkpoint, and checks that it fits the optimizer.

    Args:
        folder: the checkpoint's folder, including its tag.
        groups: the optimizer's parameter groups.
        infos: its parameters.
        rule: the rule that steps its weights.

    Returns:
        What :func:`pack` wrote, with whole bases.

    Raises:
        ValueError: the folder has no such checkpoint, or it does not fit.
    """
    path = os.path.join(folder, "zero", "optimizer_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: {folder} is not what ds_to_universal makes")
    # Use mmap: the file has the bases of all weights, and this rank needs few of them.
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        read = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    packed = (read.get("param_groups") or [{}])[0].get(KEY)
    if isinstance(packed, Mapping) and "unfit" in packed:
        raise ValueError(f"the universal checkpoint cannot be loaded: {packed['unfit']}")
    packed = _check_packed(packed, infos, rule)
    _compare_shapes(
        {i.name: i.shape for i in infos.values() if i.algorithm != CONDA}, packed["others"], ""
    )
    if len(packed["groups"]) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(packed['groups'])} parameter groups, the optimizer "
            f"{len(groups)}; make the optimizer with the same groups"
        )
    return packed


def saved_states(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yields every tensor of the groups with its saved states by name, {} if it has none.

    Raises:
        ValueError: the state dict has other numbers of groups or tensors.
    """
    saved = state_dict["param_groups"]
    counts = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in saved] != counts:
        raise ValueError(
            f"the checkpoint has {[len(group['params']) for group in saved]} tensors in its "
            f"parameter groups, the optimizer {counts}; load it with the same config and groups"
        )
    for group, theirs in zip(groups, saved, strict=True):
        for tensor, index in zip(group["params"], theirs["params"], strict=True):
            yield tensor, state_dict["state"].get(index, {})
