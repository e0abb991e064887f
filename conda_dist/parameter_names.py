"""What the parameters in the groups are called, and which path each of them takes.

Frameworks replace parameters one by one, and users filter and extend the lists in place: names
follow the parameters. Where a group has no ``algorithm``, the path of each of its parameters is
decided by name and shape, anew whenever the layout is resolved.
"""

import uuid
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from conda_dist.replaced_parameters import flat_error
from conda_dist.routing import ADAMW, CONDA, Route, clean_name, doubt, nothing_to_project, route

TAG = "_conda_name"
"""The attribute of a parameter that says what which optimizer calls it."""

PLACE = "param_groups["
"""How what a parameter without a name is called begins."""


def place_of(group: int, index: int) -> str:
    """What a parameter without a name is called."""
    return f"{PLACE}{group}]['params'][{index}]"


def is_place(name: str) -> bool:
    """Whether this is no name, but the place of a parameter without one."""
    return name.startswith(PLACE)


def name_of(groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str:
    """A parameter's name, or where it stands."""
    names = groups[group].get("param_names")
    return clean_name(names[index]) if names else place_of(group, index)


def route_by_name(name: str, param: Tensor) -> Route:
    """The default rule for a parameter by what it is called; by shape if that is its place."""
    return route(None if is_place(name) else name, param)


def path_of(name: str, param: Tensor, group: Mapping[str, Any]) -> str:
    """The path that a parameter takes: its group's algorithm, or what its name and shape say."""
    if group["algorithm"]:
        return str(group["algorithm"])
    found = route_by_name(name, param).algorithm
    return ADAMW if found == ADAMW else str(group.get("rule", CONDA))


def each(
    groups: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Every parameter with its name and its group."""
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            yield name_of(groups, g, i), param, group


def check_paths(groups: Sequence[Mapping[str, Any]], alone: bool, stacklevel: int) -> None:
    """Refuses an optimizer that would be AdamW under another name.

    Among several ranks it only warns: ZeroRedundancyOptimizer and pipelines deal parameters out,
    and the others would wait for the one that raises.

    Args:
        groups: the parameter groups.
        alone: whether this is the only rank.
        stacklevel: of the warning, as of :func:`warnings.warn`.

    Raises:
        ValueError: no trainable parameter takes the rule's path, without a group that says so.
    """
    if all(group["algorithm"] is not None for group in groups) or any(
        param.requires_grad and path_of(name, param, group) != ADAMW
        for name, param, group in each(groups)
    ):
        return
    named = [(name, param) for name, param, _ in each(groups)]
    said = nothing_to_project(named, path=groups[0].get("rule", CONDA))
    if alone:
        raise ValueError(said)
    warnings.warn(f"On this rank {said}", stacklevel=stacklevel + 1)


class Names:
    """The names of an optimizer's parameters, which follow them from list to list."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().hex
        self._matrices = set[str]()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: its parameters are others."""
        return {**self.__dict__, "_key": uuid.uuid4().hex}

    def _remember(self, param: Tensor, name: str) -> None:
        # On the parameter itself: a reference to it would keep alive what a framework replaces,
        # and with a weak one swap_tensors, and so model.to, would refuse it.
        param.__dict__[TAG] = self._key, name

    def _known(self, param: Tensor) -> str | None:
        """What a parameter was called, "" if it had no name; None if it was not seen before."""
        key, name = param.__dict__.get(TAG, (None, None))
        return name if key == self._key else None

    def follow(self, groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Brings ``param_names`` up to date after somebody has changed the groups.

        A parameter that was seen before keeps its name, wherever in the lists it is now. One that
        was not has the name at its place, if its list is as long as that of the names. Otherwise it
        has none, and is called by its place.
        """
        listed = {name for group in groups for name in group.get("param_names") or ()}
        for g, group in enumerate(groups):
            params, given = group["params"], list(group.get("param_names") or ())
            at_place = len(given) == len(params)
            names = [self._known(param) or "" for param in params]
            # Names that the caller has replaced in their list are known no longer.
            names = [name if name in listed or not at_place else "" for name in names]
            if not given and not any(names):
                continue
            kept = set(names)
            for i, param in enumerate(params):
                if not names[i] and at_place and given[i] not in kept:
                    names[i] = given[i]
                names[i] = names[i] or place_of(g, i)
                if not is_place(names[i]):
                    self._remember(param, names[i])
            group["param_names"] = names

    def added(self, groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Takes note of the last of the groups."""
        self.follow(groups)
        group, g = groups[-1], len(groups) - 1
        for i, param in enumerate(group["params"]):
            name = name_of(groups, g, i)
            if is_place(name):
                self._remember(param, "")
            if path_of(name, param, group) != ADAMW:
                self._matrices.add(name)

    def check(self, groups: Sequence[Mapping[str, Any]], title: str) -> None:
        """Refuses what has taken the place of matrices, and is none.

        One flat parameter may be there for one of them or, as DeepSpeed puts it into a group, for
        many.

        Raises:
            ValueError: there is such a parameter.
        """
        found = [(n, param, self._known(param) is not None) for n, param, _ in each(groups)]
        none_left = bool(self._matrices) and not any(param.ndim > 1 for _, param, _ in found)
        for name, param, known in found:
            # Those without names may have other places now.
            same = is_place(name) and known
            replaced = name in self._matrices and param.ndim < 2 and not same
            if replaced or (none_left and not known):
                raise flat_error(name, param, title)

    def warn(self, groups: Sequence[Mapping[str, Any]], stacklevel: int) -> None:
        """Warns once if names are missing that would decide a path, or do not tell which."""
        if self._warned:
            return
        alike = [
            name
            for name, param, group in each(groups)
            if is_place(name)
            and group["algorithm"] is None
            and path_of(name, param, group) != ADAMW
        ]
        some = any(group.get("param_names") for group in groups)
        # One matrix alone needs no name; one among parameters that have names was forgotten.
        if len(alike) < (1 if some else 2):
            free = [(n, p) for n, p, group in each(groups) if group["algorithm"] is None]
            if said := doubt([pair for pair in free if not is_place(pair[0])]):
                self._warned = True
                warnings.warn(said, stacklevel=stacklevel + 1)
            return
        self._warned = True
        listed = ", ".join(alike[:3]) + (", ..." if len(alike) > 3 else "")
        warnings.warn(
            f"The optimizer got parameters without names ({listed}), so it cannot tell embeddings, "
            "output head and routers from the projections it is meant for, and treats them alike. "
            "Names decide: pass model.named_parameters(), (name, parameter) pairs as the params "
            "of each group, or conda_dist.param_groups(model).",
            stacklevel=stacklevel + 1,
        )
