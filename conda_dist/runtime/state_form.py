"""Whether a state still fits its parameter: its shape, its dtype, its parts and its path."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.rules.states import base_name


def check_form(
    name: str, param: Tensor, state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Refuses a parameter whose data has changed so much that its state is of another one.

    Args:
        name: its name.
        param: the parameter.
        state: its state.
        dtypes: what dtypes the states must have that are of its shape.
    """
    for key, dtype in dtypes.items():
        if key not in state or f"{key}_0" in state:
            continue  # parts that have moments of their own are checked against their plans
        held = state[key]
        separate = isinstance(param, DTensor) and not isinstance(held, DTensor)
        if held.shape != param.shape and not separate:
            raise ValueError(
                f"{name}: the parameter has shape {tuple(param.shape)}, but its {key} has shape "
                f"{tuple(held.shape)}: the parameter was resized or replaced after its state was "
                "made. Drop the state (del optimizer.state[param]), so that the parameter starts "
                "afresh, or put moments of the new shape in its place."
            )
        if held.dtype != dtype:
            raise ValueError(
                f"{name}: the parameter is {param.dtype} and needs {dtype} for its {key}, which "
                f"is {held.dtype}: the dtype of one of them was changed after the state was made. "
                "Drop the state (del optimizer.state[param]), or load a checkpoint after the "
                "change, which converts it."
            )


def chosen_by(group: Mapping[str, Any]) -> str:
    """What decided the path of a parameter of the group."""
    if group["algorithm"] is None:
        return "its name and shape, for its group has no algorithm"
    return f"its group's algorithm, {group['algorithm']!r}"


def check_parts(
    name: str, state: Mapping[str, Any], splits: Sequence[int] | None, copied: Sequence[str]
) -> None:
    """Refuses a state that is of other parts; ``copied``: names of those each part has of its own.

    Raises:
        ValueError: it is.
    """
    ends = [""] if splits is None else [f"_{part}" for part in range(len(splits))]
    held = {key for key in state if base_name(key) in copied}
    needed = {key + end for key in copied for end in ends}
    counted, parts = state.get("step"), () if splits is None else (len(splits),)
    if not needed and isinstance(counted, Tensor) and tuple(counted.shape) != parts:
        held = {f"a step of shape {tuple(counted.shape)}"}
    if held and held != needed:
        raise ValueError(
            f"{name}: its state has {', '.join(sorted(held))}, but its group's splits are "
            f"{splits}; they cannot change once there is state: drop it first "
            "(del optimizer.state[param])."
        )
