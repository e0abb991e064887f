"""Loading a state dict without losing anything: checked first, then copied element by element.

torch's own loader casts every state to the parameter's dtype, which would round float32 moments
of bfloat16 parameters, and takes whatever it is given. Here the state of another optimizer or of
other shapes is refused before anything is changed.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist import storage
from conda_dist.layout import Coordinate, Layout
from conda_dist.routing import CONDA
from conda_dist.setup import Setup, name_of


def match_state(
    groups: Sequence[Mapping[str, Any]], incoming: Mapping[str, Any]
) -> dict[Tensor, Mapping[str, Any]]:
    """Finds the saved state of each parameter, and refuses what this optimizer did not save.

    Args:
        groups: the optimizer's parameter groups.
        incoming: a state dict as of ``Optimizer.state_dict``.

    Raises:
        ValueError: the state dict was written by another optimizer, for other parameters, or
            misses something.
    """
    saved_groups, saved_state = incoming["param_groups"], incoming["state"]
    ours, theirs = ([len(g["params"]) for g in some] for some in (groups, saved_groups))
    if ours != theirs:
        raise ValueError(
            f"the checkpoint has parameter groups of {theirs} parameters, this optimizer of "
            f"{ours}: build it from the same model, with the same groups."
        )
    matched: dict[Tensor, Mapping[str, Any]] = {}
    for g, saved_group in enumerate(saved_groups):
        for i, saved_id in enumerate(saved_group["params"]):
            param, name = groups[g]["params"][i], name_of(groups, g, i)
            if saved_id in saved_state:
                state = saved_state[saved_id]
                algorithms = groups[g]["algorithm"], saved_group.get("algorithm")
                _check_state(name, tuple(param.shape), *algorithms, state)
                matched[param] = state
            elif saved_state and param.requires_grad:
                raise ValueError(
                    f"{name}: its state is missing from the checkpoint, which has states for "
                    f"{len(saved_state)} of {sum(theirs)} parameters."
                )
    return matched


def _check_state(
    name: str,
    shape: tuple[int, ...],
    algorithm: str,
    saved_algorithm: str | None,
    saved: Mapping[str, Any],
) -> None:
    """Refuses a parameter's saved state if it is not what this optimizer would have saved."""
    needed = _state_shapes(shape, algorithm)
    if saved_algorithm not in (None, algorithm):
        raise ValueError(
            f"{name}: in the checkpoint it is on the {saved_algorithm} path, here on the "
            f"{algorithm} path, and the moments of the two live in different coordinates. Give "
            f'its group algorithm="{saved_algorithm}", or start with fresh optimizer state.'
        )
    if saved_algorithm is None or not needed.keys() <= saved.keys():
        raise ValueError(
            f"{name}: the checkpoint was not written by Conda: the state has "
            f"{', '.join(sorted(map(str, saved)))} where {', '.join(needed)} are needed"
            f"{'' if saved_algorithm else ', and its group names no algorithm'}. Load a "
            "checkpoint of this optimizer, or start with fresh optimizer state."
        )
    for key, expected in needed.items():
        found = tuple(getattr(saved[key], "shape", ()))
        if found != expected:
            raise ValueError(
                f"{name}: {key} has shape {found} in the checkpoint, but a parameter of shape "
                f"{shape} needs {expected}. The checkpoint is of another model."
            )


def _state_shapes(shape: tuple[int, ...], algorithm: str) -> dict[str, tuple[int, ...]]:
    """Global shape of each state of a parameter."""
    shapes: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if algorithm == CONDA:
        r = min(shape[-2:])
        shapes |= {"basis": (*shape[:-2], r, r), "basis_step": shape[:-2]}
    return shapes


def fill_state(
    setup: Setup,
    state: MutableMapping[Tensor, Any],
    saved: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Copies saved states into allocated ones, which keep their dtypes and layouts.

    Args:
        setup: the resolved parameters, their states allocated.
        state: the optimizer's state; gets copies of what was saved for frozen parameters.
        saved: from :func:`match_state`.
    """
    for member in setup.members:
        layouts = member.state_layouts()
        for key, target in member.state.items():
            value = saved[member.param][key]
            if key in layouts:
                _copy(target, layouts[key], member.mesh.coordinate, value)
            else:  # small, and whole on every rank
                target.copy_(torch.as_tensor(value))
    members = {member.param for member in setup.members}
    for param in saved.keys() - members:
        state[param] = {key: deepcopy(value) for key, value in saved[param].items()}


def _copy(target: Tensor, layout: Layout, coordinate: Coordinate, value: Any) -> None:
    """Copies a DTensor of any layout, or the whole as a plain tensor, into an allocated state."""
    ours = storage.local(target)
    if isinstance(value, DTensor):
        if isinstance(target, DTensor) and value.device_mesh == target.device_mesh:
            if value.placements != target.placements:
                value = value.redistribute(placements=target.placements)
            ours.copy_(value.to_local())
            return
        value = value.full_tensor()
    for block in layout.blocks(coordinate):
        here = tuple(slice(s, s + n) for s, n in zip(block.local, block.shape, strict=True))
        there = tuple(slice(s, s + n) for s, n in zip(block.start, block.shape, strict=True))
        ours[here].copy_(value[there])
