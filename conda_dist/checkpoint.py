"""Loading a state dict without losing anything: checked first, then copied element by element.

torch's own loader casts every state to the parameter's dtype, which would round float32 moments
of bfloat16 parameters, and takes whatever it is given. Here the state of another optimizer or of
other shapes is refused before anything is changed.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from conda_dist import maths, storage
from conda_dist.adamw_path import Plain
from conda_dist.groups import HYPERPARAMETERS, check_hyperparameters
from conda_dist.kinds import as_matrix
from conda_dist.layout import Layout
from conda_dist.names import is_place, name_of, path_of, route_by_name
from conda_dist.routing import ADAMW, CONDA, clean_name
from conda_dist.runtime.saved_state import from_saved
from conda_dist.runtime.weight import NO_BASIS, Weight
from conda_dist.setup import Setup
from conda_dist.states import CODES, basis_key, has_own, is_basis, is_own

OPTIONAL = ("param_names", "kernels")
"""Keys that only some groups have; those of this optimizer count, not the checkpoint's."""

PENDING = ("snapshot", "snapshot_step")
"""States that only an asynchronous refresh has. State dicts without them are loaded, too; torch's
distributed loader asks for them unless its planner has ``allow_partial_load``."""


@dataclass(slots=True)
class Loaded:
    """A state dict, checked against the optimizer that is to load it.

    Attributes:
        states: of each parameter that has any, what this optimizer saved of it.
        others: of each parameter that has any, what a wrapper keeps in its state.
        missing: names of trainable parameters of which nothing was saved.
        rest: the state dict for torch's own loader, without the states of parameters and with the
            parameters' names as they are here.
        merged: groups for which torch.distributed.checkpoint has taken the hyperparameters of one
            saved group out of several.
    """

    states: dict[Tensor, Mapping[str, Any]]
    others: dict[Tensor, Mapping[Any, Any]]
    missing: list[str]
    rest: dict[str, Any]
    merged: list[int] = field(default_factory=list)


def match_state(groups: Sequence[Mapping[str, Any]], incoming: Mapping[str, Any]) -> Loaded:
    """Finds the saved state of each parameter, and refuses what this optimizer did not save.

    By name where both sides have names, else by position, as torch does.

    Args:
        groups: the optimizer's parameter groups.
        incoming: a state dict as of ``Optimizer.state_dict``.

    Raises:
        TypeError: something in the state dict is of another type than this optimizer saves.
        ValueError: it was written by another optimizer, for other parameters, or misses something.
    """
    _check_form(incoming)
    _check_groups(groups, incoming)
    saved_groups, saved_state = incoming["param_groups"], incoming["state"]
    sources = _sources(groups, saved_groups)
    loaded = Loaded({}, {}, [], {})
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            name = name_of(groups, g, i)
            saved_id, saved_group = sources[param]
            own, other = _divide(saved_state.get(saved_id, {}))
            if own:
                path = path_of(name, param, group)
                splits = group["splits"] if path == CONDA else None
                _check_path(name, path, splits, saved_group, own)
                if path == ADAMW and route_by_name(name, param).algorithm == CONDA:
                    _check_origin(name, saved_id, saved_group)
                shape = tuple(param.shape)
                matrix = _matrix(name, shape, path, group, saved_group)
                _check_state(name, shape, matrix, path, splits, own)
                loaded.states[param] = own
            elif param.requires_grad:
                loaded.missing.append(name)
            if other:
                loaded.others[param] = other
    _check_missing(loaded, saved_state)
    named = [_regrouped(groups, g, saved_groups, sources) for g in range(len(groups))]
    loaded.merged = [g for g, saved in enumerate(saved_groups) if _is_merged(saved)]
    ids = {saved_id for saved_id, _ in sources.values()}
    apart = {k: v for k, v in saved_state.items() if k not in ids and not _is_state(v)}
    loaded.rest = {**incoming, "state": apart, "param_groups": named}
    return loaded


def _divide(saved: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """A parameter's saved state: what this optimizer keeps there, and what a wrapper does.

    torch's ``flatten_optimizer_state_dict`` gives an empty dict for what the checkpoint lacks.
    """
    lacking = [key for key, value in saved.items() if isinstance(value, Mapping) and not value]
    own = {key: value for key, value in saved.items() if is_own(key) and key not in lacking}
    return own, {key: value for key, value in saved.items() if not is_own(key)}


def _is_state(saved: Any) -> bool:
    """Whether something is the saved state of a parameter, not what a wrapper keeps of its own."""
    return isinstance(saved, Mapping) and has_own(saved)


def _check_missing(loaded: Loaded, saved_state: Mapping[Any, Any]) -> None:
    """Refuses a checkpoint with states of which none is one of this optimizer's.

    Otherwise parameters without saved state start afresh: they were frozen while training, say.
    """
    if not any(map(_is_state, saved_state.values())):
        loaded.missing.clear()  # saved before the first step: nobody has a state
    elif not loaded.states:
        raise ValueError(
            f"the checkpoint has states of {len(saved_state)} parameters, but of none of this "
            f"optimizer's, such as {loaded.missing[0] if loaded.missing else 'frozen ones'}: it is "
            "of another model, or damaged."
        )


def _check_form(incoming: Any) -> None:
    """Refuses what is not of the form that ``Optimizer.state_dict`` gives."""
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
    """Whether something is a list of that kind of items."""
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _check_groups(groups: Sequence[Mapping[str, Any]], incoming: Mapping[str, Any]) -> None:
    """Refuses what is not a state dict of this optimizer with these groups."""
    saved_groups = incoming["param_groups"]
    if not any("algorithm" in saved for saved in saved_groups):
        states = [state for state in incoming["state"].values() if isinstance(state, Mapping)]
        keys = sorted({str(key) for state in states for key in state})
        raise ValueError(
            "the checkpoint was not written by Conda: its parameter groups name no algorithm, and "
            f"its states have {', '.join(keys) or 'nothing'}. Load a checkpoint of this optimizer, "
            "or start with fresh optimizer state."
        )
    for g, saved in enumerate(saved_groups):
        if "algorithm" not in saved:
            continue  # torch.distributed.checkpoint found no group there: see _regrouped
        where = f"the checkpoint's parameter group {g}: "
        if missing := [key for key in HYPERPARAMETERS if key != "splits" and key not in saved]:
            raise ValueError(f"{where}it has no {', '.join(missing)}: it is damaged.")
        check_hyperparameters(saved, where, scheduled=True)
        if not isinstance(saved.get("splits"), list | tuple | None):
            raise TypeError(f"{where}splits must be rows of parts, got {saved['splits']!r}")


def _regrouped(
    groups: Sequence[Mapping[str, Any]],
    g: int,
    saved_groups: Sequence[Mapping[str, Any]],
    sources: Mapping[Tensor, tuple[Any, Mapping[str, Any]]],
) -> dict[str, Any]:
    """The saved group for one of the optimizer's groups, made of those that its parameters had.

    Its parameters, its algorithm and what belongs to them stay as they are here.

    Raises:
        ValueError: saved groups differ in a hyperparameter that one group cannot hold.
    """
    ours = groups[g]
    own = ("params", "algorithm", "splits", *OPTIONAL)
    made = {key: ours[key] for key in own if key in ours}
    made["params"] = [sources[param][0] for param in ours["params"]]
    sought = {id(sources[param][1]) for param in ours["params"]}
    if not sought and len(groups) == len(saved_groups):
        sought = {id(saved_groups[g])}
    # torch.distributed.checkpoint gives the hyperparameters of a group that became several to the
    # last of them alone. The others take them from there.
    whole = {i: saved for i, saved in enumerate(saved_groups) if "algorithm" in saved}
    found = {i: saved for i, saved in whole.items() if id(saved) in sought} or whole
    for key in dict.fromkeys(key for saved in found.values() for key in saved if key not in own):
        path = {"scale": CONDA, "update_proj_gap": CONDA, "adamw_scale": ADAMW}.get(key)
        using = {i: s for i, s in found.items() if not path or s["algorithm"] in (None, path)}
        (first, saved), *others = (using or found).items()
        made[key] = saved.get(key)
        for other, another in others:
            if not _same(made[key], another.get(key)):
                raise ValueError(
                    f"the checkpoint has the parameters of group {g} in several groups, "
                    f"with {key} {made[key]} in {_described(first, saved)} and {another.get(key)} "
                    f"in {_described(other, another)}, which one group cannot hold. Give the "
                    f"optimizer the checkpoint's groups, or set {key} alike in all of these."
                )
    return made


def _is_merged(saved: Mapping[str, Any]) -> bool:
    """Whether a group's parameters are more than those of the group that it was saved from."""
    names = saved.get("param_names") or ()
    by_name = all(isinstance(saved_id, str) for saved_id in saved["params"])
    return bool(names) and by_name and len(names) < len(saved["params"])


def _described(g: int, saved: Mapping[str, Any]) -> str:
    """A saved group in words, by its first parameter."""
    first = (saved.get("param_names") or saved["params"] or ["nothing"])[0]
    return f"group {g} (of {first}, ...)"


def _same(a: Any, b: Any) -> bool:
    """Whether two hyperparameters are the same; what frameworks keep beside them may differ."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Real | Tensor) or not isinstance(b, Real | Tensor):
        return True
    return float(a) == float(b)


def _sources(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, tuple[Any, Mapping[str, Any]]]:
    """For each parameter, the key of its saved state and its saved group."""
    ours, theirs = ([len(g["params"]) for g in some] for some in (groups, saved_groups))
    # torch.distributed.checkpoint's keys are names already, in our order; the param_names it gives
    # are those of another group if the groups differ.
    by_number = all(
        isinstance(saved_id, int) for saved in saved_groups for saved_id in saved["params"]
    )
    names = [g.get("param_names") or () for g in (*groups, *saved_groups) if g["params"]]
    named = all(names) and not any(is_place(name) for some in names for name in some)
    if ours != theirs and not (by_number and named and sum(ours) == sum(theirs)):
        raise ValueError(
            f"the checkpoint has parameter groups of {theirs} parameters, this optimizer of "
            f"{ours}: build it from the same model, with the same groups"
            + (", or with the names of the parameters on both sides." if not named else ".")
        )
    if not by_number or not named:
        return {
            param: (saved_id, saved)
            for group, saved in zip(groups, saved_groups, strict=True)
            for param, saved_id in zip(group["params"], saved["params"], strict=True)
        }
    for g, saved in enumerate(saved_groups):
        if len(saved["param_names"]) != len(saved["params"]):
            raise ValueError(
                f"the checkpoint's parameter group {g} has {len(saved['param_names'])} "
                f"'param_names' for {len(saved['params'])} 'params': it is damaged."
            )
    saved_names = {
        clean_name(name): (saved_id, saved)
        for saved in saved_groups
        for name, saved_id in zip(saved["param_names"], saved["params"], strict=True)
    }
    sources = {}
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if (name := name_of(groups, g, i)) not in saved_names:
                near = difflib.get_close_matches(name, saved_names, n=1, cutoff=0)
                raise ValueError(
                    f"{name} is not in the checkpoint, whose nearest name is {near[0]}: it is of "
                    "another model. To load by position instead, remove 'param_names' from its "
                    "parameter groups."
                )
            sources[param] = saved_names[name]
    return sources


def _check_path(
    name: str,
    path: str,
    splits: Sequence[int] | None,
    saved_group: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Refuses a parameter's saved state if it is of another path, or of other parts."""
    saved_path = CONDA if any(map(is_basis, saved)) else ADAMW
    if saved_path != path and "exp_avg" in saved:  # without, it is damaged: see _check_state
        raise ValueError(
            f"{name}: in the checkpoint it is on the {saved_path} path, here on the {path} path, "
            "and the moments of the two live in different coordinates. Put it into a group with "
            f'algorithm="{saved_path}", or start with fresh optimizer state.'
        )
    saved_splits = saved_group.get("splits") if path == CONDA else None
    if (saved_splits and tuple(saved_splits)) != (splits and tuple(splits)):
        raise ValueError(
            f"{name}: the checkpoint was written with splits={saved_splits}, this optimizer has "
            f"splits={splits}; give param_groups the same, or start with fresh optimizer state."
        )


def _check_origin(name: str, saved_id: Any, saved_group: Mapping[str, Any]) -> None:
    """Refuses the moments of a matrix that is kept off the conda path, if it may have been on it.

    torch.distributed.checkpoint reads only the states that the optimizer has here, so no bases.

    Raises:
        ValueError: the matrix was in another saved group than the one whose algorithm is known.
    """
    names = [clean_name(saved) for saved in saved_group.get("param_names") or ()]
    if isinstance(saved_id, str) and names and name not in names:
        raise ValueError(
            f"{name}: here it is on the adamw path, but the checkpoint had it in another group "
            "and perhaps on the conda path, where moments live in other coordinates. Give the "
            "optimizer the checkpoint's groups, or start with fresh optimizer state."
        )


def _matrix(
    name: str,
    shape: tuple[int, ...],
    path: str,
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
) -> tuple[int, ...]:
    """The shape that a parameter is seen in, the same as when its state was saved.

    Raises:
        ValueError: a kernel was seen otherwise.
    """
    if path != CONDA or len(shape) < 3:
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
    matrix: tuple[int, ...],
    path: str,
    splits: Sequence[int] | None,
    saved: Mapping[str, Any],
) -> None:
    """Refuses a parameter's saved state if it is not what this optimizer would have saved."""
    needed = _state_shapes(matrix, path, splits) | {"exp_avg": shape, "exp_avg_sq": shape}
    if CODES in saved:
        needed[CODES] = needed.pop("exp_avg_sq")
    if any(key in saved for key in PENDING):
        needed |= {"snapshot": shape, "snapshot_step": needed["basis_step"]}
    if not needed.keys() <= saved.keys():
        raise ValueError(
            f"{name}: the checkpoint has {', '.join(sorted(map(str, saved))) or 'nothing'} of its "
            f"state, where {', '.join(needed)} are needed: it is damaged."
        )
    for key, expected in needed.items():
        found = tuple(getattr(saved[key], "shape", ()))
        if found != expected:
            raise ValueError(
                f"{name}: {key} has shape {found} in the checkpoint, but a parameter of shape "
                f"{shape} needs {expected}. The checkpoint is of another model."
            )
        if (wrong := _unfit(key, saved[key])) is not None:
            raise ValueError(f"{name}: {key} is {wrong} in the checkpoint: it is damaged.")


def _unfit(key: str, value: Any) -> str | None:
    """What a saved state is, if no state of that name can be; counts are looked at, too."""
    counts = "step" in key
    if not isinstance(value, Tensor):
        if not counts or isinstance(value, bool) or not isinstance(value, int | float):
            return f"of type {type(value).__name__}"
        value = torch.tensor(value)
    if value.layout is not torch.strided or value.is_meta:
        return f"{value.layout} on {value.device}"
    number = value.dtype.is_floating_point or (counts and value.dtype in COUNTS)
    if not (value.dtype == torch.uint8 if key == CODES else number):
        return f"of {value.dtype}"
    if counts and not isinstance(value, DTensor) and not ((value >= -1) & (value % 1 == 0)).all():
        return f"{value.tolist()}"
    return None


COUNTS = (torch.int32, torch.int64)
"""Dtypes that steps may also have been saved in."""


def _state_shapes(
    shape: tuple[int, ...], path: str, splits: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    """Global shape of each state of a parameter."""
    parts = () if splits is None else (len(splits),)
    shapes: dict[str, tuple[int, ...]] = {"step": parts, "exp_avg": shape, "exp_avg_sq": shape}
    if path == CONDA:
        repeats = 1 if splits is None else shape[-2] // sum(splits)
        for part, rows in enumerate(splits or shape[-2:-1]):
            r = min(rows * repeats, shape[-1])
            shapes[basis_key(None if splits is None else part)] = (*shape[:-2], r, r)
        shapes["basis_step"] = (*parts, *shape[:-2])
    return shapes


def fill_state(setup: Setup, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Copies saved states into allocated ones, which keep their dtypes and layouts.

    Args:
        setup: the resolved parameters, their states allocated.
        saved: from :func:`match_state`.
    """
    for member in setup.members:
        if member.param not in saved:
            continue
        state, source = member.state, saved[member.param]
        for key, layout in member.state_layouts().items():
            name = member.saved_key(key)
            if name in (CODES, "exp_avg_sq") and name not in source:
                # Kept in codes there and not here, or the other way round.
                name = "exp_avg_sq" if name == CODES else CODES
                elements = _read(member, key, layout, source[name])
                values = maths.decode(elements, torch.float32)
                maths.store_(storage.local(state[key]), values, None)
            elif name in source or name not in PENDING:
                storage.local(state[key]).copy_(_read(member, key, layout, source[name]))
        for key in state.keys() & {"step", "basis_step"}:  # small, and whole on every rank
            state[key].copy_(torch.as_tensor(source[key]))
        if "snapshot_step" in state:  # without one a refresh that was pending is due again
            state["snapshot_step"].copy_(torch.as_tensor(source.get("snapshot_step", NO_BASIS)))


def _read(member: Weight | Plain, key: str, layout: Layout, value: Tensor) -> Tensor:
    """This rank's elements of a saved state, a DTensor of any layout or the whole."""
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
    elements = torch.empty_like(storage.local(target), dtype=value.dtype)
    storage.copy_blocks(elements, layout, member.mesh.coordinate, value)
    return elements


def keep(value: Any, param: Tensor, here: Any) -> Any:
    """A copy of what a wrapper keeps in a parameter's state, as this optimizer is to keep it.

    Dtypes and types stay. Tensors go to the parameter's device, as with torch's loader, but single
    numbers (counts) stay where they are. A tensor whose like is here already is laid out alike.

    Args:
        value: what was saved.
        param: the parameter.
        here: what the optimizer has in its place, if anything.
    """
    if isinstance(value, Mapping):
        known = here if isinstance(here, Mapping) else {}
        return {key: keep(item, param, known.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(keep(item, param, None) for item in value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if isinstance(here, DTensor) and value.shape == here.shape:
        return _laid_out(value, here)
    if not isinstance(value, DTensor) and value.ndim:
        value = value.to(param.device)
    return value.clone()


def _laid_out(value: Tensor, here: DTensor) -> Tensor:
    """A copy of a tensor, a DTensor of any layout or a whole one, laid out like another."""
    if isinstance(value, DTensor) and value.device_mesh == here.device_mesh:
        return value.redistribute(placements=here.placements).clone()
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = whole.to(storage.local(here).device)
    return distribute_tensor(whole, here.device_mesh, here.placements, src_data_rank=None).clone()
