"""The names of the parameters in the groups, and the path that each parameter takes.

Frameworks replace parameters one by one, and users filter and extend the lists in place, so a name
belongs to a parameter and not to a place in a list. In a group without an ``algorithm``, the name
and the shape of a parameter choose its path. They are read again whenever parameters are planned.
"""

import uuid
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from conda_dist.layer_kinds import ambiguous_names
from conda_dist.replaced_parameters import flat_error
from conda_dist.routing import (
    ADAMW,
    CONDA,
    Route,
    clean_name,
    no_matrix_message,
    route,
)

TAG = "_conda_name"
"""A parameter's attribute for (key of an optimizer, name that this optimizer uses)."""

PLACE = "param_groups["
"""A parameter without a name is called by its place in the groups; this is the text's start."""


def place_of(group: int, index: int) -> str:
    """The place of a parameter in the groups, for a parameter without a name."""
    return f"{PLACE}{group}]['params'][{index}]"


def is_place(name: str) -> bool:
    """Whether a name is a place from :func:`place_of`."""
    return name.startswith(PLACE)


def name_of(groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str:
    """A parameter's name, or its place if it has no name."""
    names = groups[group].get("param_names")
    return clean_name(names[index]) if names else place_of(group, index)


def route_by_name(name: str, param: Tensor) -> Route:
    """Routes a parameter by its name and shape, or by its shape alone if it has no name."""
    return route(None if is_place(name) else name, param)


def path_of(name: str, param: Tensor, group: Mapping[str, Any]) -> str:
    """The path of a parameter: its group's algorithm, else the route of its name and shape."""
    if group["algorithm"]:
        return str(group["algorithm"])
    found = route_by_name(name, param).algorithm
    return ADAMW if found == ADAMW else str(group.get("rule", CONDA))


def named_parameters(
    groups: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Yields (name, parameter, group) for every parameter of the groups."""
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            yield name_of(groups, g, i), param, group


def check_paths(groups: Sequence[Mapping[str, Any]], alone: bool, stacklevel: int) -> None:
    """Refuses an optimizer whose parameters would all take the adamw path.

    If there are several ranks, it only warns: ZeroRedundancyOptimizer and pipelines give each rank
    some of the parameters, and if one rank raised, the others would wait for it.

    Args:
        groups: the parameter groups.
        alone: whether this is the only rank.
        stacklevel: of the warning; see :func:`warnings.warn`.

    Raises:
        ValueError: no trainable parameter takes the rule's path, and at least one group has no
            ``algorithm``.
    """
    if all(group["algorithm"] is not None for group in groups) or any(
        param.requires_grad and path_of(name, param, group) != ADAMW
        for name, param, group in named_parameters(groups)
    ):
        return
    named = [(name, param) for name, param, _ in named_parameters(groups)]
    message = no_matrix_message(named, path=groups[0].get("rule", CONDA))
    if alone:
        raise ValueError(message)
    warnings.warn(f"On this rank {message}", stacklevel=stacklevel + 1)


def _ambiguity_warning(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """The text of a warning if some names do not tell which kind of weight they name, else None.

    Args:
        named: the parameters that :func:`route` routes by their names.
    """
    shapes = {clean_name(name): tuple(param.shape) for name, param in named}
    projected = {clean_name(n) for n, param in named if route(n, param).algorithm == CONDA}
    found = ambiguous_names(shapes, projected)
    if not found:
        return None
    listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return (
        f"{len(found)} matrices have names that do not tell whether they are embeddings, output "
        f"heads, routers or projections: {listed}. Use conda_dist.param_groups(model), which looks "
        "at the modules, or give their group an algorithm."
    )


class ParameterNames:
    """Keeps the names of an optimizer's parameters, wherever in the groups the parameters move."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().hex
        self._matrices = set[str]()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has its own parameters, so it gets its own key."""
        return {**self.__dict__, "_key": uuid.uuid4().hex}

    def _remember(self, param: Tensor, name: str) -> None:
        # Store the name on the parameter. A reference to the parameter would keep it alive after a
        # framework has replaced it, and swap_tensors (model.to) refuses parameters that have weak
        # references.
        param.__dict__[TAG] = self._key, name

    def _remembered(self, param: Tensor) -> str | None:
        """The name that :meth:`_remember` stored: "" for none, None if it never saw the tensor."""
        key, name = param.__dict__.get(TAG, (None, None))
        return name if key == self._key else None

    def update(self, groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Updates ``param_names`` in place after users or frameworks have changed the groups.

        A known parameter keeps its name, wherever in the lists it is now. A new parameter gets the
        name at its index if ``params`` and ``param_names`` have the same length. Otherwise it has
        no name, and its place in the groups stands for it.
        """
        listed = {name for group in groups for name in group.get("param_names") or ()}
        for g, group in enumerate(groups):
            params, given = group["params"], list(group.get("param_names") or ())
            same_length = len(given) == len(params)
            names = [self._remembered(param) or "" for param in params]
            # Forget names that the caller has replaced in the list.
            names = [name if name in listed or not same_length else "" for name in names]
            if not given and not any(names):
                continue
            used = set(names)
            for i, param in enumerate(params):
                if not names[i] and same_length and given[i] not in used:
                    names[i] = given[i]
                names[i] = names[i] or place_of(g, i)
                if not is_place(names[i]):
                    self._remember(param, names[i])
            group["param_names"] = names

    def record_added(self, groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Records the parameters of the last group, which has just been added."""
        self.update(groups)
        group, g = groups[-1], len(groups) - 1
        for i, param in enumerate(group["params"]):
            name = name_of(groups, g, i)
            if is_place(name):
                self._remember(param, "")
            if path_of(name, param, group) != ADAMW:
                self._matrices.add(name)

    def refuse_flattened(self, groups: Sequence[Mapping[str, Any]], title: str) -> None:
        """Refuses flat parameters that have replaced one matrix or, under DeepSpeed, many.

        Args:
            groups: the parameter groups.
            title: the optimizer's class, for errors.

        Raises:
            ValueError: there is such a parameter.
        """
        found = [
            (name, param, self._remembered(param) is not None)
            for name, param, _ in named_parameters(groups)
        ]
        none_left = bool(self._matrices) and not any(param.ndim > 1 for _, param, _ in found)
        for name, param, known in found:
            # A known vector without a name may have moved to the place where a matrix was.
            moved = is_place(name) and known
            replaced = name in self._matrices and param.ndim < 2 and not moved
            if replaced or (none_left and not known):
                raise flat_error(name, param, title)

    def warn_if_ambiguous(self, groups: Sequence[Mapping[str, Any]], stacklevel: int) -> None:
        """Warns once if paths depend on names that are missing or ambiguous.

        Args:
            groups: the parameter groups.
            stacklevel: of the warning; see :func:`warnings.warn`.
        """
        if self._warned:
            return
        nameless = [
            name
            for name, param, group in named_parameters(groups)
            if is_place(name)
            and group["algorithm"] is None
            and path_of(name, param, group) != ADAMW
        ]
        some_named = any(group.get("param_names") for group in groups)
        # A single matrix needs no name, but a nameless matrix among named parameters is a mistake.
        if len(nameless) < (1 if some_named else 2):
            routed_by_name = [
                (name, param)
                for name, param, group in named_parameters(groups)
                if group["algorithm"] is None and not is_place(name)
            ]
            if message := _ambiguity_warning(routed_by_name):
                self._warned = True
                warnings.warn(message, stacklevel=stacklevel + 1)
            return
        self._warned = True
        listed = ", ".join(nameless[:3]) + (", ..." if len(nameless) > 3 else "")
        warnings.warn(
            f"The optimizer got parameters without names ({listed}), so it cannot tell embeddings, "
            "the output head and routers from other matrices, and treats all matrices alike. "
            "Names decide: pass model.named_parameters(), (name, parameter) pairs as the params "
            "of each group, or conda_dist.param_groups(model).",
            stacklevel=stacklevel + 1,
        )
