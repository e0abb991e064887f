"""Checks that a state fits its parameter: shape, dtype, and the parts that ``splits`` make."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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


def check_parts(
    name: str, state: Mapping[str, Any], splits: Sequence[int] | None, copied: Sequence[str]
) -> None:
    """Checks that a state was made for the parts that the group's ``splits`` make.

    Args:
        name: fully qualified name of the parameter.
        state: the parameter's state; may be empty.
        splits: rows of each part; None if the weight is in one part.
        copied: names of the rule's copied states, of which each part has its own, such as
            "basis_0" and "basis_1". A part may lack some, because of its shape.

    Raises:
        ValueError: the state has other parts.
    """
    held = {key for key in state if base_name(key) in copied}
    ends = {key.removeprefix(base_name(key)) for key in held}
    needed = {""} if splits is None else {f"_{part}" for part in range(len(splits))}
    counted, parts = state.get("step"), () if splits is None else (len(splits),)
    if not copied and isinstance(counted, Tensor) and tuple(counted.shape) != parts:
        held = {f"a step of shape {tuple(counted.shape)}"}
    if held and ends != needed:
        raise ValueError(
            f"{name}: its state has {', '.join(sorted(held))}, but its group's splits are "
            f"{splits}. splits cannot change while there is state: drop the state first "
            "(del optimizer.state[param])."
        )
