"""The names of the parameters in the groups, and the path that each parameter takes.

Frameworks replace parameters one by one, and users filter and extend the lists in place. Names
therefore follow the parameters. In a group without an ``algorithm``, the name and the shape of a
parameter decide its path, again whenever the layout is resolved.
"""

import uuid
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from conda_dist.replaced_parameters import flat_error
from conda_dist.routing import ADAMW, CONDA, Route, clean_name, doubt, nothing_to_project, route

TAG = "_conda_name"
"""The attribute of a parameter that holds an optimizer's key and the name that it uses."""

PLACE = "param_groups["
"""The beginning of what a parameter without a name is called."""


def place_of(group: int, index: int) -> str:
    """What to call a parameter without a name: its place in the groups."""
    return f"{PLACE}{group}]['params'][{index}]"


def is_place(name: str) -> bool:
    """Whether this is the place of a parameter without a name."""
    return name.startswith(PLACE)


def name_of(groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str:
    """A parameter's name, or its place."""
    names = groups[group].get("param_names")
    return clean_name(names[index]) if names else place_of(group, index)


def route_by_name(name: str, param: Tensor) -> Route:
    """The default rule for a parameter: by its name and shape, or by shape alone without a name."""
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

    With several ranks it only warns: ZeroRedundancyOptimizer and pipelines give each rank some of
    the parameters, and the other ranks would wait for the one that raises.

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
    """The names of an optimizer's parameters, which follow the parameters from list to list."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().hex
        self._matrices = set[str]()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has other parameters, so it gets a key of its own."""
        return {**self.__dict__, "_key": uuid.uuid4().hex}

    def _remember(self, param: Tensor, name: str) -> None:
        # The name is kept on the parameter itself. A reference to the parameter would keep it alive
        # after a framework has replaced it, and swap_tensors (model.to) refuses a parameter that
        # has weak references.
        param.__dict__[TAG] = self._key, name

    def _known(self, param: Tensor) -> str | None:
        """The parameter's name when it was last seen: "" without a name, None if never seen."""
        key, name = param.__dict__.get(TAG, (None, None))
        return name if key == self._key else None

    def follow(self, groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Brings ``param_names`` up to date after somebody has changed the groups.

        A parameter that was seen before keeps its name, wherever in the lists it is now. A new
        parameter takes the name at its place, if the lists of parameters and names are equally
        long. Otherwise it has no name, and is called by its place.
        """
        listed = {name for group in groups for name in group.get("param_names") or ()}
        for g, group in enumerate(groups):
            params, given = group["params"], list(group.get("param_names") or ())
            at_place = len(given) == len(params)
            names = [self._known(param) or "" for param in params]
            # The caller may have replaced names in the list: forget those.
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
        """Records the parameters of the last group, which was just added."""
        self.follow(groups)
        group, g = groups[-1], len(groups) - 1
        for i, param in enumerate(group["params"]):
            name = name_of(groups, g, i)
            if is_place(name):
                self._remember(param, "")
            if path_of(name, param, group) != ADAMW:
                self._matrices.add(name)

    def check(self, groups: Sequence[Mapping[str, Any]], title: str) -> None:
        """Refuses flat parameters that have replaced matrices.

        A flat parameter may replace one matrix or, as in DeepSpeed's groups, many.

        Raises:
            ValueError: there is such a parameter.
        """
        found = [(n, param, self._known(param) is not None) for n, param, _ in each(groups)]
        none_left = bool(self._matrices) and not any(param.ndim > 1 for _, param, _ in found)
        for name, param, known in found:
            # A parameter without a name may have moved to another place.
            same = is_place(name) and known
            replaced = name in self._matrices and param.ndim < 2 and not same
            if replaced or (none_left and not known):
                raise flat_error(name, param, title)

    def warn(self, groups: Sequence[Mapping[str, Any]], stacklevel: int) -> None:
        """Warns once if a path depends on names that are missing, or that do not tell."""
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
