"""Checks that a state fits its parameter: shape, dtype, and the parts that ``splits`` make."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.layout.layout import Layout
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import base_name


def check_form(
    name: str, param: Tensor, state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Checks that the states of a parameter's shape still have that shape, and the right dtype.

    Args:
        name: fully qualified name of the parameter.
        param: the parameter.
        state: the parameter's state; may be empty.
        dtypes: by name of a state of the parameter's shape, the dtype that it must have.

    Raises:
        ValueError: a shape or a dtype has changed after the state was made.
    """
    for key, dtype in dtypes.items():
        if key not in state or f"{key}_0" in state:
            continue  # parts with their own moments are checked against their plans
        held = state[key]
        separate = isinstance(param, DTensor) and not isinstance(held, DTensor)
        if held.shape != param.shape and not separate:
            raise ValueError(
                f"{name}: the parameter has shape {tuple(param.shape)}, but its {key} has shape "
                f"{tuple(held.shape)}: the parameter was resized or replaced after its state was "
                "made. Drop the state (del optimizer.state[param]), so that new state is made, or "
                "replace the moments by moments of the new shape."
            )
        if held.dtype != dtype:
            raise ValueError(
                f"{name}: the parameter is {param.dtype}, so its {key} must be {dtype}, but it is "
                f"{held.dtype}: the dtype of one of them was changed after the state was made. "
                "Drop the state (del optimizer.state[param]), or load a checkpoint after the "
                "change: loading converts it."
            )


def chosen_by(group: Mapping[str, Any]) -> str:
    """What decides the path of a parameter in this group, for an error."""
    if group["algorithm"] is None:
        return "its name and shape, because its group has no algorithm"
    return f"its group's algorithm, {group['algorithm']!r}"


class Part(Protocol):
    """A weight or a part of it."""

    @property
    def layout(self) -> Layout:
        """Its layout."""

    @property
    def part(self) -> int | None:
        """Its index; None if it is the whole weight."""


def copied_keys(rule: Rule, dtype: torch.dtype, parts: Iterable[Part]) -> set[str]:
    """The keys of the copied states of all parts of a weight, such as "basis_0" and "basis_1".

    Args:
        rule: the rule. Which states it has may depend on the shape.
        dtype: dtype of the weight.
        parts: the parts.
    """
    return {
        name if each.part is None else f"{name}_{each.part}"
        for each in parts
        for name, spec in rule.states(each.layout.shape[-2], each.layout.shape[-1], dtype).items()
        if not spec.cut
    }


def check_parts(
    name: str, state: Mapping[str, Any], splits: Sequence[int] | None, needed: AbstractSet[str]
) -> None:
    """Checks that a state was made for the parts that the group's ``splits`` make.

    Args:
        name: fully qualified name of the parameter.
        state: the parameter's state; may be empty.
        splits: rows of each part; None if the weight is in one part.
        needed: keys of the copied states of all parts, such as "basis_0" and "basis_1".

    Raises:
        ValueError: the state has other parts.
    """
    copied = set(map(base_name, needed))
    held = {key for key in state if base_name(key) in copied}
    counted, parts = state.get("step"), () if splits is None else (len(splits),)
    if not needed and isinstance(counted, Tensor) and tuple(counted.shape) != parts:
        held = {f"a step of shape {tuple(counted.shape)}"}
    if held and held != needed:
        raise ValueError(
            f"{name}: its state has {', '.join(sorted(held))}, but its group's splits are "
            f"{splits}. splits cannot change while there is state: drop the state first "
            "(del optimizer.state[param])."
        )
