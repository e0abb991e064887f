"""Loads a state dict: checks all of it first, then copies it into the allocated states.

torch's own loader casts every state to the parameter's dtype, which would round the float32 moments
of bfloat16 parameters, and it does not check what it loads. This one keeps dtypes, and refuses the
state of another optimizer or of other shapes before anything changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.layer_kinds import as_matrix
from conda_dist.layout.layout import Layout
from conda_dist.numerics import low_precision
from conda_dist.parameter_names import name_of, path_of
from conda_dist.plan.calendar import NO_BASIS
from conda_dist.routing import ADAMW
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import CODES, has_own, is_of_rule, is_own
from conda_dist.runtime import dtensor
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.parameters import Setup
from conda_dist.runtime.saved_state import from_saved
from conda_dist.runtime.weight import Weight
from conda_dist.saved_groups import (
    check_groups,
    check_unseen,
    find_sources,
    is_merged,
    regroup,
)

PENDING = ("snapshot", "snapshot_step")
"""States that exist only with ``refresh_delay``. A state dict may lack them, or have them although
``refresh_delay`` is 0 here. torch's distributed loader, however, needs them unless its planner has
``allow_partial_load``."""


@dataclass(slots=True)
class MatchedState:
    """A checked state dict, with the parameters of this optimizer.

    Attributes:
        states: this optimizer's states of each parameter, by name.
        wrapper_states: states that a wrapper has put beside them, by name, of each parameter.
        missing: names of the trainable parameters without saved state.
        for_torch: the state dict for torch's own loader: without the states of parameters, and with
            the parameter names of this optimizer.
        merged: indices of the groups for which torch.distributed.checkpoint merged several saved
            groups and kept the hyperparameters of only one.
    """

    states: dict[Tensor, Mapping[str, Any]]
    wrapper_states: dict[Tensor, Mapping[Any, Any]]
    missing: list[str]
    for_torch: dict[str, Any]
    merged: list[int] = field(default_factory=list)


def match_state(
    groups: Sequence[Mapping[str, Any]],
    incoming: Mapping[str, Any],
    rule: Rule,
    hyperparameters: Sequence[str],
) -> MatchedState:
    """Finds the saved state of each parameter, and refuses a state dict that does not fit.

    Parameters are matched by name if both sides have names, else by position, as torch does.

    Args:
        groups: the optimizer's parameter groups.
        incoming: a state dict in the form of ``Optimizer.state_dict``.
        rule: the optimizer's rule.
        hyperparameters: the keys that its groups must have.

    Raises:
        TypeError: an item of the state dict has a type that this optimizer does not save.
        ValueError: the state dict is from another optimizer or other parameters, or is incomplete.
    """
    _check_form(incoming)
    check_groups(groups, incoming, rule, hyperparameters)
    saved_groups, saved_state = incoming["param_groups"], incoming["state"]
    sources = find_sources(groups, saved_groups)
    matched = MatchedState({}, {}, [], {})
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            name = name_of(groups, g, i)
            saved_id, saved_group = sources[param]
            own, others = _separate(saved_state.get(saved_id, {}))
            if own:
                path = path_of(name, param, group)
                splits = group["splits"] if path != ADAMW else None
                _check_path(name, path, rule, splits, saved_group, own)
                if path == ADAMW:
                    check_unseen(name, param, rule, saved_groups)
                shape = tuple(param.shape)
                matrix = _matrix(name, shape, path, group, saved_group)
                needed = _state_shapes(shape, matrix, None if path == ADAMW else rule, splits)
                _check_state(name, shape, needed, own)
                matched.states[param] = own
            elif param.requires_grad:
                matched.missing.append(name)
            if others:
                matched.wrapper_states[param] = others
    _check_missing(matched, saved_state)
    named = [regroup(groups, g, saved_groups, sources, rule) for g in range(len(groups))]
    matched.merged = [g for g, saved in enumerate(saved_groups) if is_merged(saved)]
    # Entries of the state that belong to no parameter are a wrapper's: leave them to torch.
    ids = {saved_id for saved_id, _ in sources.values()}
    rest = {k: v for k, v in saved_state.items() if k not in ids and not has_own(v)}
    matched.for_torch = {**incoming, "state": rest, "param_groups": named}
    return matched


def _separate(saved: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Separates a parameter's saved states into this optimizer's and those of a wrapper.

    torch's ``flatten_optimizer_state_dict`` gives an empty dict for a state that the checkpoint
    lacks; those are left out.
    """
    lacking = [key for key, value in saved.items() if isinstance(value, Mapping) and not value]
    own = {key: value for key, value in saved.items() if is_own(key) and key not in lacking}
    return own, {key: value for key, value in saved.items() if not is_own(key)}


def _check_missing(matched: MatchedState, saved_state: Mapping[Any, Any]) -> None:
    """Refuses a checkpoint that has states, but none of this optimizer's parameters.

    If it has the states of some parameters, the others were perhaps frozen, and start afresh.
    """
    if not any(map(has_own, saved_state.values())):
        matched.missing.clear()  # it was saved before the first step: no parameter has state
    elif not matched.states:
        raise ValueError(
            f"the checkpoint has states of {len(saved_state)} parameters, but of none of this "
            f"optimizer's, such as {matched.missing[0] if matched.missing else 'frozen ones'}: it "
            "is of another model, or damaged."
        )


def _check_form(incoming: Any) -> None:
    """Refuses an object that does not have the form of ``Optimizer.state_dict()``."""
    if not isinstance(incoming, Mapping):
        raise TypeError(f"a state dict must be a dict, got {type(incoming).__name__}")
    if not {"param_groups", "state"} <= incoming.keys():
        some = ", ".join(map(repr, list(incoming)[:3]))
        raise ValueError(
            f"this is not the state dict of an optimizer, which has 'state' and 'param_groups': "
            f"it has {some or 'nothing'}{', ...' if len(incoming) > 3 else ''}."
        )
    state, saved_groups = incoming["state"], incoming["param_groups"]
    if not isinstance(state, Mapping):
        raise TypeError("the checkpoint's 'state' is no dict: it is damaged.")
    if not isinstance(saved_groups, list | tuple):
        raise TypeError("the checkpoint's 'param_groups' are no list: it is damaged.")
    for g, saved in enumerate(saved_groups):
        where = f"the checkpoint's parameter group {g}"
        if not isinstance(saved, Mapping) or not _lists(saved.get("params"), int | str):
            raise TypeError(f"{where} is no dict with a list of 'params': it is damaged.")
        if not _lists(saved.get("param_names") or (), str):
            raise TypeError(f"{where}: its 'param_names' are no list of names: it is damaged.")
        for saved_id in saved["params"]:
            if not isinstance(state.get(saved_id, {}), Mapping):
                raise TypeError(
                    f"the checkpoint's state of parameter {saved_id} is no dict: it is damaged."
                )


def _lists(value: Any, kind: Any) -> bool:
    """Whether a value is a list or tuple of items of one type."""
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _check_path(
    name: str,
    path: str,
    rule: Rule,
    splits: Sequence[int] | None,
    saved_group: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Refuses a parameter's saved state if it comes from another path, or from other splits."""
    saved_path = rule.name if is_of_rule(saved) else ADAMW
    # State without a basis and without moments is damaged: _check_state says so.
    if saved_path != path and (saved_path != ADAMW or "exp_avg" in saved):
        raise ValueError(
            f"{name}: in the checkpoint it is on the {saved_path} path, here on the {path} path, "
            "and the moments of the two have different coordinates. Put it into a group with "
            f'algorithm="{saved_path}", or start with fresh optimizer state.'
        )
    saved_splits = saved_group.get("splits") if path != ADAMW else None
    if (saved_splits and tuple(saved_splits)) != (splits and tuple(splits)):
        raise ValueError(
            f"{name}: the checkpoint was written with splits={saved_splits}, this optimizer has "
            f"splits={splits}; give param_groups the same, or start with fresh optimizer state."
        )


def _matrix(
    name: str,
    shape: tuple[int, ...],
    path: str,
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
) -> tuple[int, ...]:
    """The shape in which the rule sees a parameter: (out, in * k * k) for a projected kernel.

    Raises:
        ValueError: the saved group and this group see a kernel differently.
    """
    if path == ADAMW or len(shape) < 3:
        return shape
    ours, theirs = (bool(g.get("kernels")) for g in (group, saved_group))
    if ours != theirs:
        raise ValueError(
            f"{name}: the checkpoint was written with kernels={theirs}, this optimizer has "
            f"kernels={ours}; give param_groups the same, or start with fresh optimizer state."
        )
    return as_matrix(shape) if ours else shape


def _check_state(
    name: str,
    shape: tuple[int, ...],
    needed: dict[str, tuple[int, ...]],
    saved: Mapping[str, Any],
) -> None:
    """Refuses a parameter's saved state if a state is missing, or has a wrong shape or dtype.

    Args:
        name: the parameter's name.
        shape: the parameter's global shape.
        needed: the global shape of each state, from :func:`_state_shapes`.
        saved: the saved states.
    """
    if CODES in saved:
        needed[CODES] = needed.pop("exp_avg_sq")
    if "basis_step" in needed and any(key in saved for key in PENDING):
        needed |= {"snapshot": shape, "snapshot_step": needed["basis_step"]}
    for key, expected in needed.items():
        found = tuple(getattr(saved.get(key), "shape", expected))
        if found != expected:
            raise ValueError(
                f"{name}: {key} has shape {found} in the checkpoint, but a parameter of shape "
                f"{shape} needs {expected}. The checkpoint is of another model."
            )
    if not needed.keys() <= saved.keys():
        ours, theirs = ([key for key in map(str, x) if "_basis" in key] for x in (needed, saved))
        if bool(ours) != bool(theirs) and any("basis" in str(key) for key in saved):
            source = "gradients" if theirs else "momentum"
            raise ValueError(
                f"{name}: the checkpoint's bases are from the {source}, here they are not; give "
                f'basis_source="{source}", or start with fresh optimizer state.'
            )
        raise ValueError(
            f"{name}: the checkpoint has {', '.join(sorted(map(str, saved))) or 'nothing'} of its "
            f"state, but {', '.join(needed)} are needed: it is damaged."
        )
    for key in needed:
        if (wrong := _describe_damage(key, saved[key])) is not None:
            raise ValueError(f"{name}: {key} is {wrong} in the checkpoint: it is damaged.")


def _describe_damage(key: str, value: Any) -> str | None:
    """Says what is wrong with a saved state's type, dtype or, for a count, value; None if nothing.

    The values of a count are read unless it is a DTensor.
    """
    is_count = "step" in key
    if not isinstance(value, Tensor):
        if not is_count or isinstance(value, bool) or not isinstance(value, int | float):
            return f"of type {type(value).__name__}"
        value = torch.tensor(value)
    if value.layout is not torch.strided or value.is_meta:
        return f"{value.layout} on {value.device}"
    number = value.dtype.is_floating_point or (is_count and value.dtype in COUNT_DTYPES)
    if not (value.dtype == torch.uint8 if key == CODES else number):
        return f"of {value.dtype}"
    if is_count and not isinstance(value, DTensor) and not ((value >= -1) & (value % 1 == 0)).all():
        return f"{value.tolist()}"
    return None


COUNT_DTYPES = (torch.int32, torch.int64)
"""Dtypes of saved counts that are accepted besides floating point."""


def _state_shapes(
    shape: tuple[int, ...],
    matrix: tuple[int, ...],
    rule: Rule | None,
    splits: Sequence[int] | None,
) -> dict[str, tuple[int, ...]]:
    """The global shape of each state of a parameter, by name.

    Args:
        shape: the parameter's global shape.
        matrix: the shape in which the rule sees it, from :func:`_matrix`.
        rule: the optimizer's rule; None on the adamw path.
        splits: the rows of each part; None: the parameter is not split.
    """
    if rule is None:
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    parts = () if splits is None else (len(splits),)
    shapes: dict[str, tuple[int, ...]] = {"step": parts}
    repeats = 1 if splits is None else matrix[-2] // sum(splits)
    for part, rows in enumerate(splits or matrix[-2:-1]):
        suffix = "" if splits is None else f"_{part}"
        for name, state in rule.states(rows * repeats, matrix[-1], torch.float32).items():
            if not state.optional:
                key = "exp_avg_sq" if name == CODES else name
                copied = {f"{key}{suffix}": (*matrix[:-2], *state.shape)}
                shapes |= {key: shape} if state.cut else copied
    counts = [name for name in rule.counts if name not in PENDING]
    return shapes | dict.fromkeys(counts, (*parts, *matrix[:-2]))


def fill_state(setup: Setup, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Copies saved states into allocated states, which keep their dtypes and layouts.

    Args:
        setup: the planned parameters, with allocated states.
        saved: :attr:`MatchedState.states`.
    """
    for member in setup.members:
        if member.param not in saved:
            continue
        state, source = member.state, saved[member.param]
        for key, layout in member.state_layouts().items():
            name = member.saved_key(key)
            if name in (CODES, "exp_avg_sq") and name not in source:
                # One side stores the second moment in 8-bit codes and the other does not.
                name = "exp_avg_sq" if name == CODES else CODES
                elements = _read(member, key, layout, source[name])
                values = low_precision.decode(elements, torch.float32)
                low_precision.store_(dtensor.local(state[key]), values, None)
            elif name in source or name not in PENDING:
                dtensor.local(state[key]).copy_(_read(member, key, layout, source[name]))
        for key in ("step", *member.counts):  # small, and not sharded
            # Without a saved "snapshot_step" no refresh is pending. One that was is due again.
            state[key].copy_(torch.as_tensor(source.get(key, NO_BASIS)))


def _read(member: Weight | AdamWParameter, key: str, layout: Layout, value: Tensor) -> Tensor:
    """This rank's elements of a saved state.

    Args:
        member: the parameter.
        key: the name of its state here.
        layout: the layout of that state here.
        value: the saved state: a DTensor with any placements, or a whole plain tensor.
    """
    if isinstance(member, Weight) and member.plan.separate:
        return from_saved(member, key, value)
    target = member.state[key]
    if isinstance(value, DTensor):
        if isinstance(target, DTensor) and value.device_mesh == target.device_mesh:
            if value.placements != target.placements:
                value = value.redistribute(placements=target.placements)
            return value.to_local()
        value = value.full_tensor()
    if layout.local_shape(member.mesh.coordinate) == tuple(value.shape):
        return value
    elements = torch.empty_like(dtensor.local(target), dtype=value.dtype)
    dtensor.copy_blocks(elements, layout, member.mesh.coordinate, value)
    return elements
