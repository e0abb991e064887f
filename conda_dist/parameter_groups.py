"""Checks of the parameter groups that a user gives. One group of the user stays one group."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conda_dist.options import GROUP_OPTIONS, LARGEST, OPTIONS
from conda_dist.routing import ADAMW, CONDA, check_matrix, check_splits, route

SHARED = ("lr", "betas", "eps", "weight_decay", "adamw_scale", "splits")
"""Hyperparameters of all rules. A rule adds its own in ``Rule.hyperparameters``."""

HYPERPARAMETERS = (*GROUP_OPTIONS, "splits")
DROPPED = ("foreach", "fused")
"""Keys that say how AdamW computes. Frameworks add them to any group, and they are removed."""
UNSUPPORTED = ("maximize", "capturable", "differentiable", "amsgrad")
"""AdamW's keys that are an error unless their value is false."""


def check_hyperparameters(
    values: Mapping[str, Any], where: str = "", *, scheduled: bool = False
) -> None:
    """Checks the hyperparameters among ``values``.

    Args:
        values: by name. Names that are no hyperparameters are ignored.
        where: text that errors put before a name.
        scheduled: whether a scheduler may have set ``lr``; then it may be below zero, because
            some schedulers end at zero minus a rounding error.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """
    for name, option in GROUP_OPTIONS.items():
        if name in values:
            value = values[name]
            if name == "lr" and isinstance(value, Tensor):
                value = _read_rate(value, where)
            option.check(value, where, least=-LARGEST if scheduled and name == "lr" else None)
    lr, decay = values.get("lr", 0.0), values.get("weight_decay", 0.0)
    for name in ("scale", "adamw_scale"):
        scale = values.get(name, 0.0)
        if not isinstance(lr, Tensor) and abs(lr * scale * (1 - lr * decay)) > LARGEST:
            raise ValueError(
                f"{where}lr {lr}, {name} {scale} and weight_decay {decay} are too large"
            )
    algorithm, known = values.get("algorithm"), (values.get("rule", CONDA), ADAMW)
    if algorithm is not None and not _is_one_of(algorithm, known):
        raise ValueError(
            f"{where}algorithm must be one of {', '.join(known)}, or None to choose a path for "
            f"each parameter by its name and shape; got {algorithm!r}"
        )


def _is_one_of(value: Any, known: Sequence[str]) -> bool:
    return isinstance(value, str) and value in known  # "in" compares an array item by item


def _read_rate(lr: Tensor, where: str) -> Any:
    """The value of a learning rate that is a tensor; 0 on a GPU, where reading it would wait."""
    plain = lr.layout is torch.strided and not lr.is_meta
    if lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool or not plain:
        raise ValueError(f"{where}lr must be a number or a tensor of one real element")
    return lr.item() if lr.device.type == "cpu" else 0.0


def read_group(
    group: Mapping[str, Any],
    where: str,
    rule: str = CONDA,
    hyperparameters: Sequence[str] = HYPERPARAMETERS,
) -> dict[str, Any]:
    """Checks a group, and returns a copy for ``torch.optim.Optimizer.add_param_group``.

    Args:
        group: a group dict as torch's optimizers take it. ``params`` is a tensor, or an iterable of
            tensors or of (name, tensor) pairs. ``param_names`` is optional.
        where: text that errors put before a name.
        rule: the name of the rule's path.
        hyperparameters: the keys that the optimizer reads.

    Returns:
        A new dict with the parameters in the same order, and with their names if they have any.

    Raises:
        TypeError: ``params`` has an item that is no tensor, or a value has the wrong type.
        ValueError: a parameter cannot be optimized, or a value is out of range.
    """
    if not isinstance(group, Mapping):
        raise TypeError(f"{where}a group must be a dict, got {type(group).__name__}")
    taken = ("params", "param_names", *DROPPED)
    options = {key: value for key, value in group.items() if key not in taken}
    if (given := options.setdefault("rule", rule)) != rule:
        raise ValueError(f"{where}the group is for rule {given!r}, this optimizer's is {rule!r}")
    check_hyperparameters(options, where)
    _check_keys(options, where, hyperparameters)
    named = _named(group, where)
    seen: dict[Tensor, str | None] = {}
    for name, param in named:
        if nn.parameter.is_lazy(param):
            raise ValueError(
                f"{where}{name or 'a parameter'} has no shape yet; initialize lazy modules with a "
                "forward pass before making the optimizer."
            )
        full = where + (name or f"parameter of shape {tuple(param.shape)}")
        check_parameter(full, param)
        if param in seen:
            raise ValueError(f"{full} is in the group twice, also as {seen[param]}; list it once.")
        seen[param] = name

    options.setdefault("algorithm", None)
    options.setdefault("splits", None)
    algorithm, splits = options["algorithm"], options["splits"]
    kernels = options.get("kernels", False)
    if not isinstance(kernels, bool):
        raise TypeError(f"{where}kernels must be a bool, got {kernels!r}")
    if kernels and algorithm in (None, ADAMW):
        raise ValueError(
            f'{where}kernels=True needs algorithm="{rule}"; param_groups(model, kernels=True) '
            "makes such groups"
        )
    for name, param in named:
        if (algorithm or route(name, param).algorithm) != ADAMW:
            check_matrix(where + (name or "parameter"), param, rule)
            if splits is not None:
                check_splits(where + (name or "parameter"), param, splits, kernels)
    if splits is not None and algorithm == ADAMW:
        raise ValueError(f"{where}splits {splits!r} have no meaning on the adamw path")
    options["params"] = [param if name is None else (name, param) for name, param in named]
    return options


def _check_keys(options: dict[str, Any], where: str, hyperparameters: Sequence[str]) -> None:
    """Refuses keys that would have no effect, and removes AdamW's keys whose value is false."""
    reserved = ("params", "param_names", "algorithm", "rule", *hyperparameters)
    for key in options.keys() - set(reserved) - set(UNSUPPORTED):
        if key in OPTIONS and key not in GROUP_OPTIONS:
            raise ValueError(
                f"{where}{key} holds for the whole optimizer: give it to Conda(...), not to a group"
            )
        if key == "proj_type":  # the released code's groups have it
            raise ValueError(
                f"{where}unknown option 'proj_type': Conda always projects the smaller side of a "
                'matrix, as the released code\'s "std" does; leave it out'
            )
        if near := difflib.get_close_matches(key, reserved, 1, 0.8):
            raise ValueError(f"{where}unknown option {key!r}; did you mean {near[0]!r}?")
    for key in UNSUPPORTED:
        if options.pop(key, None):
            raise ValueError(f"{where}option {key!r} is not supported; leave it out.")


def _named(group: Mapping[str, Any], where: str) -> list[tuple[str | None, Tensor]]:
    """The (name, parameter) pairs of a group; all names are None if the group has none."""
    if "params" not in group:
        raise ValueError(f"{where}a group needs params, got only {', '.join(map(str, group))}")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(f"{where}params must be ordered, not a set: ranks must agree on the order")
    if not isinstance(params, Iterable):
        raise TypeError(f"{where}params must be tensors, got {type(params).__name__}")
    params = [params] if isinstance(params, Tensor) else list(params)
    names = list(group.get("param_names") or [None] * len(params))
    if len(names) != len(params):
        raise ValueError(f"{where}{len(names)} param_names for {len(params)} params")
    pairs = [
        item if isinstance(item, tuple) and len(item) == 2 else (name, item)
        for name, item in zip(names, params, strict=True)
    ]
    named = sum(name is not None for name, _ in pairs)
    if named not in (0, len(pairs)):
        raise ValueError(f"{where}{named} of {len(pairs)} parameters have a name; name all or none")
    for name, param in pairs:
        if not isinstance(name, str | None) and isinstance(param, Tensor):
            raise TypeError(f"{where}the name of a parameter must be a str, got {name!r}")
        if not isinstance(param, Tensor):
            raise TypeError(f"{where}params must be tensors, got {type(param).__name__}")
    return pairs


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses a parameter that cannot be optimized.

    Raises:
        ValueError: it is no leaf, has no real floating point dtype, is sparse, or several of its
            elements share memory.
    """
    if not (param.is_leaf or param.retains_grad):
        raise ValueError(f"{name}: can't optimize a non-leaf Tensor; detach() it first.")
    if not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        raise ValueError(
            f"{name}: only real floating point parameters can be optimized, got {param.dtype}"
            + ("; use torch.view_as_real." if param.dtype.is_complex else ".")
        )
    if param.layout is not torch.strided:
        raise ValueError(f"{name}: only dense parameters can be optimized, got {param.layout}.")
    if any(n > 1 and not step for n, step in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name}: some of its elements share memory, as after expand(), and cannot be updated "
            "separately; make it contiguous() first."
        )
