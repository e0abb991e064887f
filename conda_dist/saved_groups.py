"""The parameter groups of a state dict: which of them each parameter was in, and what they held.

Groups may be divided otherwise than when they were saved: parameters are found by name.
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
"""Keys that only some groups have; those of this optimizer count, not the checkpoint's."""


def check_groups(
    groups: Sequence[Mapping[str, Any]],
    incoming: Mapping[str, Any],
    rule: Rule,
    hyperparameters: Sequence[str],
) -> None:
    """Refuses what is not a state dict of this optimizer with these groups."""
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
            f"optimizer's is {rule.name!r}: the states of one mean nothing to the other. Load it "
            "into an optimizer of that rule, or start with fresh optimizer state."
        )
    for g, saved in enumerate(saved_groups):
        if "algorithm" not in saved:
            continue  # torch.distributed.checkpoint found no group there: see regroup
        where = f"the checkpoint's parameter group {g}: "
        if missing := [key for key in hyperparameters if key != "splits" and key not in saved]:
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
        path = _path_using(key, rule)
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


def is_merged(saved: Mapping[str, Any]) -> bool:
    """Whether a group's parameters are more than those of the group that it was saved from."""
    names = saved.get("param_names") or ()
    by_name = all(isinstance(saved_id, str) for saved_id in saved["params"])
    return bool(names) and by_name and len(names) < len(saved["params"])


def check_unseen(
    name: str, param: Tensor, rule: Rule, saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses moments for AdamW that may be a rule's, where nothing tells which they are.

    torch.distributed.checkpoint reads no basis for a parameter that has none here, and where groups
    are divided otherwise it gives the algorithm of some saved groups only.

    Raises:
        ValueError: by its name and shape the parameter would have been on the rule's path.
    """
    whole = all("algorithm" in saved and not is_merged(saved) for saved in saved_groups)
    known = (s.get("param_names") or () for s in saved_groups if s.get("algorithm") == ADAMW)
    if whole or name in map(clean_name, itertools.chain(*known)):
        return
    if route_by_name(name, param).algorithm != ADAMW:
        raise ValueError(
            f"{name}: it is on the adamw path here, and may be on the {rule.name} path in the "
            "checkpoint, which divides the parameters among groups otherwise. Give the optimizer "
            "the checkpoint's groups, or load a state dict of Optimizer.state_dict."
        )


def _described(g: int, saved: Mapping[str, Any]) -> str:
    """A saved group in words, by its first parameter."""
    first = (saved.get("param_names") or saved["params"] or ["nothing"])[0]
    return f"group {g} (of {first}, ...)"


def _path_using(key: str, rule: Rule) -> str | None:
    """The only path on which a hyperparameter has an effect; None if it has one on both."""
    if key.startswith("adamw_"):
        return ADAMW
    return rule.name if key in rule.hyperparameters and key != "correct_bias" else None


def _same(a: Any, b: Any) -> bool:
    """Whether two hyperparameters are the same; what frameworks keep beside them may differ."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Real | Tensor) or not isinstance(b, Real | Tensor):
        return True
    return float(a) == float(b)


def find_sources(
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
