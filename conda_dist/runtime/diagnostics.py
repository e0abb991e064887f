"""Diagnostics: what some steps measure, added up over the ranks, to be read at any time.

A step that collects takes norms of this rank's elements of each parameter: of its gradient, of its
change, of its momentum and of its weight. At its end the squares are added up, in one packed
all-reduce along each mesh dimension, and a copy of the sums to the host is started. Nobody waits
for it before :func:`read`. What depends on whole matrices comes from their last
refresh: the owner measures it there, and it goes to all ranks with the outcome (``refresh.py``).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from conda_dist.layout.layout import Coordinate, Copies, Layout, Split
from conda_dist.plan.calendar import NO_BASIS
from conda_dist.runtime import dtensor
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.agreement import HostCopy
from conda_dist.runtime.collectives import Mesh, all_sum
from conda_dist.runtime.weight import Weight

Member = Weight | AdamWParameter
CHANGE, GRADIENT, MOMENTUM, WEIGHT = range(4)
"""The norms of a parameter, in this order."""


class Signals(TypedDict):
    """What a step has collected of one parameter (or part), or of all parameters of one path.

    Of a path: norms are over all of its elements, ``steps_since_refresh`` is the largest, and
    ``staleness`` and ``effective_rank`` are means over its weights.

    Attributes:
        path: "adamw", or the rule's: "conda", "muon", and so on.
        step: steps that the parameter had taken, that one included; of a path the largest.
        update_ratio: RMS of the change in that step, weight decay included, divided by the RMS of
            the weight after it.
        gradient_norm: Frobenius norm of the gradient.
        momentum_norm: Frobenius norm of the first moment after the step.
        steps_since_refresh: steps since the momentum from which the basis was taken; of a batch the
            largest. None without a basis, and for rules that keep no ``basis``.
        staleness: share of the momentum's energy off the diagonal of the basis, just before its
            last refresh, see :class:`conda_dist.numerics.decomposition.Spectrum`. A mean over the
            matrices of a batch. None before the second refresh, as the first finds no basis.
        effective_rank: the momentum's effective rank at its last refresh; see there. A mean in the
            same way. None without a basis.
    """

    path: str
    step: int
    update_ratio: float
    gradient_norm: float
    momentum_norm: float
    steps_since_refresh: int | None
    staleness: float | None
    effective_rank: float | None


def scalars(signals: Mapping[str, Signals]) -> dict[str, float]:
    """The numbers as "conda/update_ratio" and so on, for loggers; without those that are None."""
    return {
        f"{name}/{key}": value
        for name, found in signals.items()
        for key, value in found.items()
        if isinstance(value, int | float) and key != "step"
    }


@dataclass(frozen=True, slots=True)
class _Known:
    """What the host knows of a parameter without measuring; see :class:`Signals`."""

    name: str
    path: str
    step: int
    since: int | None = None
    staleness: float | None = None
    effective_rank: float | None = None

    @classmethod
    def of(cls, member: Member) -> "_Known":
        """What is known now, after a step."""
        if isinstance(member, AdamWParameter):
            return cls(member.name, "adamw", _steps(member))
        taken = [] if not member.rule.refreshes else member.basis_steps()
        since = [_steps(member) - 1 - int(when) for when in taken if when != NO_BASIS]
        stale = [s.staleness for s in member.spectra.values() if s.staleness is not None]
        ranks = [s.effective_rank for s in member.spectra.values()]
        found = max(since, default=None), _mean(stale), _mean(ranks)
        return cls(member.name, member.rule.name, _steps(member), *found)


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sums of squares of one mesh: for each member of it what is known, and its four sums.

    Members that had no gradient have None, and sums that are zero.
    """

    known: list[_Known | None]
    squares: HostCopy


class Collection:
    """What one step measures.

    Args:
        members: the parameters, by mesh; the same on all ranks of a mesh.
        grads: the local gradient of each parameter; it may be overwritten later.
        found: where :meth:`finish` puts the sums of each mesh.
    """

    def __init__(
        self,
        members: Mapping[Mesh, Sequence[Member]],
        grads: Mapping[Tensor, Tensor | None],
        found: MutableMapping[Mesh, _Sums],
    ) -> None:
        self._members, self._found = members, found
        self._norms: dict[Any, list[Tensor | None]] = {}  # of those that have a gradient
        for member in (m for mine in members.values() for m in mine):
            if (grad := grads[member.param]) is not None:
                rows = grad if isinstance(member, AdamWParameter) else member.gradient(grad)
                counted = _is_counted(_storage(member), member.mesh.coordinate)
                norm = _norm([rows]) if counted else None
                self._norms[_key(member)] = [None, norm, None, None]

    @contextmanager
    def change(self, member: Member) -> Iterator[None]:
        """A context in which a parameter changes. It needs a copy of this rank's elements."""
        norms = self._norms.get(_key(member))
        if norms is None or not _is_counted(_storage(member), member.mesh.coordinate):
            yield
            return
        before = [view.clone() for view in _views(member)]
        yield
        for copy, view in zip(before, _views(member), strict=True):
            copy.sub_(view)
        norms[CHANGE] = _norm(before)

    def finish(self) -> None:
        """Measures weights and momenta, adds up over the ranks and starts the copies to the host.

        All ranks of a mesh send as many numbers, whatever gradients they have.
        """
        for mesh, members in self._members.items():
            self._found[mesh] = self._add_up(mesh, members)

    def _add_up(self, mesh: Mesh, members: Sequence[Member]) -> _Sums:
        device = dtensor.local(members[0].param).device
        nothing = torch.zeros((), device=device)
        known: list[_Known | None] = []
        columns: list[Tensor] = []
        for member in members:
            norms = self._norms.get(_key(member))
            known.append(None if norms is None else _Known.of(member))
            if norms is not None:
                if _is_counted(_storage(member), mesh.coordinate):
                    norms[WEIGHT] = _norm(_views(member))
                layout, momentum = _momentum(member)
                if _is_counted(layout, mesh.coordinate):
                    norms[MOMENTUM] = _norm(momentum)
            columns += [nothing if norm is None else norm for norm in norms or [None] * 4]
        return _Sums(known, HostCopy(all_sum(mesh, torch.stack(columns).double().square_())))


class Diagnostics:
    """The diagnostics of an optimizer since its last plans were made. They are not state.

    Every rank of a mesh finds the same steps to collect in: those whose number is a multiple of
    ``every``, counted from the largest number of steps that a parameter of the mesh had taken.

    Args:
        members: all parameters.
        meshes: their meshes.
        every: the option ``diagnostics_every``, at least 1.

    Attributes:
        step: number of steps before and with the last one that collected; 0 before the first.
    """

    def __init__(self, members: Sequence[Member], meshes: Sequence[Mesh], every: int) -> None:
        self._every, self.step = every, 0
        self._members: dict[Mesh, list[Member]] = {mesh: [] for mesh in meshes}
        self.replace(members)
        self._steps = [max(map(_steps, mine), default=0) for mine in self._members.values()]
        self._sums: dict[Mesh, _Sums] = {}

    def replace(self, members: Sequence[Member]) -> None:
        """Takes the members again, after their tensors were moved."""
        for mesh in self._members:
            self._members[mesh] = [member for member in members if member.mesh == mesh]

    def begin(
        self, grads: Mapping[Tensor, Tensor | None], started: Sequence[bool]
    ) -> Collection | None:
        """Counts a step. Returns the collection to fill if this step collects, else None.

        Args:
            grads: the local gradient of each parameter.
            started: for each mesh whether this step counts.
        """
        due = {}
        for i, (mesh, mine) in enumerate(self._members.items()):
            self._steps[i] += started[i]
            if started[i] and self._steps[i] % self._every == 0:
                due[mesh] = mine
        if not due:
            return None
        self.step = max(self._steps)
        return Collection(due, grads, self._sums)

    def rows(self) -> Iterator[tuple[_Known, list[float]]]:
        """What is known of each parameter, and its sums of squares. Waits for their copy."""
        for sums in self._sums.values():
            squares = sums.squares.wait().view(-1, 4).tolist()
            for known, found in zip(sums.known, squares, strict=True):
                if known is not None:
                    yield known, found


def read(diagnostics: Iterable[Diagnostics], summed: bool) -> dict[str, Signals]:
    """See :meth:`conda_dist.matrix_optimizer.MatrixOptimizer.diagnostics`."""
    rows: dict[str, list[tuple[_Known, list[float]]]] = defaultdict(list)
    for row in (row for found in diagnostics for row in found.rows()):
        rows[row[0].path if summed else row[0].name].append(row)
    return {key: _signals(found) for key, found in rows.items()}


def _signals(rows: Sequence[tuple[_Known, Sequence[float]]]) -> Signals:
    """The signals of some parameters of one path together."""
    change, gradient, momentum, weight = map(sum, zip(*(s for _, s in rows), strict=True))
    since = [known.since for known, _ in rows if known.since is not None]
    stale = [known.staleness for known, _ in rows if known.staleness is not None]
    ranks = [known.effective_rank for known, _ in rows if known.effective_rank is not None]
    return Signals(
        path=rows[0][0].path,
        step=max(known.step for known, _ in rows),
        update_ratio=math.sqrt(change / weight) if weight else 0.0,
        gradient_norm=math.sqrt(gradient),
        momentum_norm=math.sqrt(momentum),
        steps_since_refresh=max(since, default=None),
        staleness=_mean(stale),
        effective_rank=_mean(ranks),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _steps(member: Member) -> int:
    """Number of steps that a parameter has taken; 0 before its state is allocated."""
    if "step" not in member.state:
        return 0
    return int(member.state["step"]) if isinstance(member, AdamWParameter) else member.step


def _key(member: Member) -> tuple[int, int | None]:
    """What tells a parameter, or a part of one, from all others."""
    return id(member.param), None if isinstance(member, AdamWParameter) else member.plan.part


def _storage(member: Member) -> Layout:
    return member.layout if isinstance(member, AdamWParameter) else member.plan.storage


def _views(member: Member) -> list[Tensor]:
    """Views of this rank's elements of the parameter."""
    local = dtensor.local(member.param)
    return [local] if isinstance(member, AdamWParameter) else member.views(local)


def _momentum(member: Member) -> tuple[Layout, list[Tensor]]:
    """The layout of the first moment, and views of this rank's elements of it."""
    if isinstance(member, AdamWParameter):
        return member.layout, [dtensor.local(member.state["exp_avg"])]
    return member.plan.moments, member.momentum


def _is_counted(layout: Layout, coordinate: Coordinate) -> bool:
    """Whether this rank is the first of those that hold copies of its elements."""
    return all(
        isinstance(placement, Split)
        or index == (placement.among[0] if isinstance(placement, Copies) else 0)
        for placement, index in zip(layout.placements, coordinate, strict=True)
    )


def _norm(pieces: Sequence[Tensor]) -> Tensor:
    """The norm of some tensors together, (), in at least float32."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.promote_types(piece.dtype, torch.float32))
        for piece in pieces
    ]
    norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return norm
