"""Matches the parameter groups of a state dict with those of the optimizer that loads it.

The groups may have changed since they were saved, because parameters are matched by name.
"""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.parameter_names import is_place, name_of, route_by_name
from conda_dist.routing import ADAMW, clean_name
from conda_dist.rules.rule import Rule

OPTIONAL = ("param_names", "kernels")
"""Keys that only some groups have. A group keeps its own values of them when it loads."""


def check_groups(
    groups: Sequence[Mapping[str, Any]],
    incoming: Mapping[str, Any],
    rule: Rule,
    hyperparameters: Sequence[str],
) -> None:
    """Refuses a state dict whose groups are from another optimizer or rule, or damaged.

    Args:
        groups: the optimizer's parameter groups.
        incoming: the state dict.
        rule: the optimizer's rule.
        hyperparameters: the keys that each group must have.

    Raises:
        TypeError: a hyperparameter has the wrong type.
        ValueError: see above.
    """
    saved_groups = incoming["param_groups"]
    if not any("algorithm" in saved for saved in saved_groups):
        states = [state for state in incoming["state"].values() if isinstance(state, Mapping)]
        keys = sorted({str(key) for state in states for key in state})
        raise ValueError(
            f"the checkpoint was not written by {rule.title}: its parameter groups name no "
            f"algorithm, and its states have {', '.join(keys) or 'nothing'}. Load a checkpoint of "
            "this optimizer, or start with fresh optimizer state."
        )
    written = {str(saved.get("rule", rule.name)) for saved in saved_groups} - {rule.name}
    if written:
        raise ValueError(
            f"the checkpoint was written by rule {', '.join(map(repr, sorted(written)))}, and this "
            f"optimizer's is {rule.name!r}, which cannot use its states. Load it into an optimizer "
            "of that rule, or start with fresh optimizer state."
        )
    for g, saved in enumerate(saved_groups):
        if "algorithm" not in saved:
            continue  # torch.distributed.checkpoint left its hyperparameters out: see regroup
        where = f"the checkpoint's parameter group {g}: "
        optional = {"splits", *rule.added}
        if missing := [key for key in hyperparameters if key not in optional and key not in saved]:
            raise ValueError(f"{where}it has no {', '.join(missing)}: it is damaged.")
        check_hyperparameters(saved, where, scheduled=True)
        rule.check(saved, where)
        if not isinstance(saved.get("splits"), list | tuple | None):
            raise TypeError(f"{where}splits must be rows of parts, got {saved['splits']!r}")


def regroup(
    groups: Sequence[Mapping[str, Any]],
    g: int,
    saved_groups: Sequence[Mapping[str, Any]],
    sources: Mapping[Tensor, tuple[Any, Mapping[str, Any]]],
    rule: Rule,
) -> dict[str, Any]:
    """Builds the group dict that torch loads into group ``g``, from its parameters' saved groups.

    Parameters, algorithm, splits and kernels stay as they are in the optimizer; hyperparameters
    come from the saved groups, as far as these have them.

    Args:
        groups: the optimizer's parameter groups.
        g: index of the group.
        saved_groups: the groups of the state dict.
        sources: from :func:`find_sources`.
        rule: the optimizer's rule.

    Raises:
        ValueError: the saved groups differ in a hyperparameter.
    """
    ours = groups[g]
    own = ("params", "algorithm", "splits", *OPTIONAL)
    built = {key: ours[key] for key in own if key in ours}
    built["params"] = [sources[param][0] for param in ours["params"]]
    wanted = {id(sources[param][1]) for param in ours["params"]}
    if not wanted and len(groups) == len(saved_groups):  # an empty group
        wanted = {id(saved_groups[g])}
    # If one saved group is now several groups, torch.distributed.checkpoint gives its
    # hyperparameters to the last of them only. The others take them from there.
    complete = {i: saved for i, saved in enumerate(saved_groups) if "algorithm" in saved}
    found = {i: saved for i, saved in complete.items() if id(saved) in wanted} or complete
    for key in dict.fromkeys(key for saved in found.values() for key in saved if key not in own):
        path = _path_using(key, rule)
        using = {i: s for i, s in found.items() if not path or s["algorithm"] in (None, path)}
        (first, saved), *others = (using or found).items()
        built[key] = saved.get(key)
        for other, another in others:
            if not _same(built[key], another.get(key)):
                raise ValueError(
                    f"the checkpoint has the parameters of group {g} in several groups, "
                    f"with {key} {built[key]} in {_describe(first, saved)} and {another.get(key)} "
                    f"in {_describe(other, another)}, which one group cannot hold. Give the "
                    f"optimizer the checkpoint's groups, or set {key} alike in all of these."
                )
    for key in rule.added:
        built.setdefault(key, ours[key])
    return built


def is_merged(saved: Mapping[str, Any]) -> bool:
    """Whether torch.distributed.checkpoint has put parameters of several saved groups into one.

    It then gives names as the ids of all parameters, but ``param_names`` of one saved group only.
    """
    names = saved.get("param_names") or ()
    by_name = all(isinstance(saved_id, str) for saved_id in saved["params"])
    return bool(names) and by_name and len(names) < len(saved["params"])


def check_unseen(
    name: str, param: Tensor, rule: Rule, saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses moments of an AdamW parameter if they may come from the rule's path.

    torch.distributed.checkpoint does not read the basis of a parameter that has no basis here, and
    if the groups have changed, it does not give the algorithm of every saved group. So moments
    from both paths can look the same.

    Args:
        name: the parameter's name.
        param: the parameter, on the adamw path here.
        rule: the optimizer's rule.
        saved_groups: the groups of the state dict.

    Raises:
        ValueError: no saved group says that the parameter was on the adamw path, and by its name
            and shape it would have been on the rule's path.
    """
    complete = all("algorithm" in saved and not is_merged(saved) for saved in saved_groups)
    on_adamw = (s.get("param_names") or () for s in saved_groups if s.get("algorithm") == ADAMW)
    if complete or name in map(clean_name, itertools.chain(*on_adamw)):
        return
    if route_by_name(name, param).algorithm != ADAMW:
        raise ValueError(
            f"{name}: it is on the adamw path here, and may be on the {rule.name} path in the "
            "checkpoint, which has other parameter groups. Give the optimizer the checkpoint's "
            "groups, or load the result of Optimizer.state_dict."
        )


def _describe(g: int, saved: Mapping[str, Any]) -> str:
    """Names a saved group by its index and its first parameter."""
    first = (saved.get("param_names") or saved["params"] or ["nothing"])[0]
    return f"group {g} (of {first}, ...)"


def _path_using(key: str, rule: Rule) -> str | None:
    """The path that uses a hyperparameter; None if both paths use it."""
    if key.startswith("adamw_"):
        return ADAMW
    return rule.name if key in rule.hyperparameters and key != "correct_bias" else None


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal, or are no numbers and so belong to a framework."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Real | Tensor) or not isinstance(b, Real | Tensor):
        return True
    return float(a) == float(b)


def find_sources(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, tuple[Any, Mapping[str, Any]]]:
    """Finds, for each parameter, the key of its saved state and its saved group.

    Args:
        groups: the optimizer's parameter groups.
        saved_groups: the groups of the state dict.

    Raises:
        ValueError: the numbers of parameters differ, a name is not in the checkpoint, or the
            checkpoint is damaged.
    """
    ours, theirs = ([len(g["params"]) for g in some] for some in (groups, saved_groups))
    # torch.distributed.checkpoint gives names as ids, in the order of our groups. If the groups
    # have changed, its param_names are those of another group, so do not read them.
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
