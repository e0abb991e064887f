"""Layer: integrations. What DeepSpeed's checkpoints hold of Conda, and whether it fits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from conda_dist.integrations.deepspeed.partitions import Member
from conda_dist.routing import CONDA

KEY, FORMAT = "conda", 1

Weights: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By name of a weight its ``step``, ``basis`` and ``basis_step``."""


def pack(kept: Weights, members: Mapping[Tensor, Member]) -> dict[str, Any]:
    """The part of a state dict that torch's loader would cast or drop."""
    shapes = {m.name: list(m.shape) for m in members.values() if m.algorithm == CONDA}
    return {
        "format": FORMAT,
        "shapes": shapes,
        "weights": {name: dict(tensors) for name, tensors in kept.items()},
    }


def check(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    members: Mapping[Tensor, Member],
) -> Weights:
    """Holds a state dict against the optimizer that is to load it.

    Returns:
        What was kept of its weights.

    Raises:
        ValueError: it does not fit.
    """
    extra = state_dict.get(KEY)
    if not isinstance(extra, Mapping) or extra.get("format") != FORMAT:
        raise ValueError(
            "the checkpoint's optimizer state was not written by Conda under DeepSpeed, or by "
            "another version of it; load the model alone with load_optimizer_states=False"
        )
    ours = {m.name: m.shape for m in members.values() if m.algorithm == CONDA}
    theirs = {name: tuple(shape) for name, shape in extra["shapes"].items()}
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name}: the checkpoint has {theirs.get(name, 'nothing')} on the conda path, "
                f"here it is {ours.get(name, 'nothing')}"
            )
    for index, (tensor, saved) in enumerate(states(state_dict, groups)):
        for name in ("exp_avg", "exp_avg_sq") if saved else ():
            if name not in saved or saved[name].shape != tensor.shape:
                found = tuple(saved[name].shape) if name in saved else "nothing"
                raise ValueError(
                    f"{name} of tensor {index}: the checkpoint has {found}, here it is "
                    f"{tuple(tensor.shape)}; load it on as many ranks, with the same config"
                )
    weights: Weights = extra["weights"]
    if weights and (missing := ours.keys() - weights.keys()):
        raise ValueError(f"{min(missing)}: the checkpoint has no basis of it")
    return weights


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
