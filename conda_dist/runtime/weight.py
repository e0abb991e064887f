"""One weight on the conda path at run time: its plan, its tensors and its part of a step."""

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from conda_dist import maths, storage
from conda_dist.decomposition import CAUSES, Outcome
from conda_dist.exchange import Mesh
from conda_dist.flat import Flat
from conda_dist.hyperparameters import hyper_of
from conda_dist.layout import Layout
from conda_dist.maths import matrices
from conda_dist.options import Options
from conda_dist.plan.weight_plan import WeightPlan
from conda_dist.runtime.scratch import Scratch
from conda_dist.states import (
    basis_dtype,
    basis_key,
    moment_dtype,
    second_dtype,
    second_key,
)

NO_BASIS = -1.0
"""The ``basis_step`` of a matrix that still has the identity for a basis, and the
``snapshot_step`` of one that has no refresh pending."""

MAX_FAILURES = 3
"""All ranks raise when so many refreshes of one matrix have failed in a row."""

CORRECTED_EVERY = 16
"""Refreshes by orthogonal iteration from one in which the basis is made orthonormal again to the
next. In between it drifts by less than 5e-6 in float32, measured for r from 16 to 1024, and the two
products are saved in a refresh that is due every few steps."""


def _pieces(rows: Tensor, views: list[Tensor]) -> tuple[Tensor, ...]:
    """The rows of a part cut as its views are."""
    if len(views) == 1:
        return (rows,)
    return torch.split(rows, [view.shape[-2] for view in views], dim=-2)


class Weight:
    """A weight (..., m, n) on the conda path, or some rows of one.

    Parts of a weight share its parameter and its state: ``step`` and ``basis_step`` have an entry
    for each part, and each part has a basis of its own. Where all parts are in place, they have
    views of one moment of all rows, else each has moments of its own (``plan.separate``).

    Args:
        param: the parameter; of one in flat partitions this rank's range of elements, (elements,).
        plan: its plan, the same on all ranks.
        mesh: the ranks that share it.
        group: the parameter group it is in, read at every step.
        states: ``optimizer.state``.
        options: the optimizer's options.
    """

    def __init__(
        self,
        param: Tensor,
        plan: WeightPlan,
        mesh: Mesh,
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        options: Options,
    ) -> None:
        self.param, self.plan, self.mesh = param, plan, mesh
        self.group, self.states, self.options = group, states, options
        self.failures: dict[int, int] = {}  # refreshes of a matrix that failed in a row
        self._loaded: tuple[Tensor, Tensor] | None = None
        product = options.product_dtype or basis_dtype(param, options)
        # Gradient and update travel so: they are rounded to the products' dtype anyway.
        self.travel_dtype = min(param.dtype, product, key=lambda dtype: dtype.itemsize)
        self.basis_key = basis_key(plan.part)
        own = f"_{plan.part}" if plan.separate and plan.part is not None else ""
        self.first_key = f"exp_avg{own}"
        self.second_key = f"{second_key(options)}{own}"
        self.snapshot_key = f"snapshot{own}"

    @property
    def state(self) -> dict[str, Any]:
        """Its parameter's state as it is now; empty before it is allocated."""
        return self.states.get(self.param, {})

    @property
    def name(self) -> str:
        """Its fully qualified name, or what stands for one."""
        return self.plan.name

    def state_layouts(self) -> dict[str, Layout]:
        """Where the elements of each state are; the first part in place speaks for the moments."""
        layouts = {self.basis_key: self.plan.basis}
        if not self.plan.part or self.plan.separate:
            moments = self.plan.moments.whole if not self.plan.separate else self.plan.moments
            snapshot = (self.snapshot_key,) if self.is_async else ()
            names = (self.first_key, self.second_key, *snapshot)
            layouts = {**dict.fromkeys(names, moments), **layouts}
        return layouts

    def saved_key(self, key: str) -> str:
        """What a state is called in checkpoints, where parts share the moments of all rows."""
        names = {self.first_key: "exp_avg", self.second_key: second_key(self.options)}
        return {**names, self.snapshot_key: "snapshot"}.get(key, key)

    @property
    def is_async(self) -> bool:
        """Whether its refreshes, after the first, are decomposed in the background."""
        return self.options.is_async

    def init_state(self) -> None:
        """Allocates the state, whole and at once; leaves alone what is there."""
        if self.basis_key in self.state:
            return
        state = self.states[self.param]
        device = storage.local(self.param).device
        parts = () if self.plan.part is None else (len(self.group["splits"]),)
        if not self.plan.part:
            state.setdefault("step", torch.zeros(parts, dtype=torch.float32, device="cpu"))
        for name, layout in self.state_layouts().items():
            if name in state:  # moments in flat partitions are whoever's made the partition
                continue
            shape = layout.local_shape(self.mesh.coordinate)
            elements = torch.zeros(shape, dtype=self.state_dtype(name), device=device)
            if name == self.basis_key:
                self._set_identity(elements)
            state[name] = self._wrap(layout, elements)
        if not self.plan.part:
            taken = (*parts, *self.plan.storage.shape[:-2])
            for name in ("basis_step", *(("snapshot_step",) if self.is_async else ())):
                state[name] = torch.full(taken, NO_BASIS, dtype=torch.float32, device="cpu")

    def state_dtype(self, name: str) -> torch.dtype:
        """Dtype of a state of that name."""
        if name == self.basis_key:
            return basis_dtype(self.param, self.options)
        of = second_dtype if name == self.second_key else moment_dtype
        return of(self.param, self.options)

    def _wrap(self, layout: Layout, elements: Tensor) -> Tensor:
        """This rank's elements of a state as they are kept."""
        return elements if self.plan.separate else storage.like(self.param, layout, elements)

    def _set_identity(self, elements: Tensor) -> None:
        for block in self.plan.basis.blocks(self.mesh.coordinate):
            rows = torch.arange(block.shape[-2], device=elements.device)
            elements[..., block.local[-2] + rows, block.start[-2] + rows] = 1

    def _own(self, key: str) -> Tensor:
        """This part's entry or entries of ``step`` or ``basis_step``; a view."""
        counts: Tensor = self.state[key]
        return counts if self.plan.part is None else counts[self.plan.part]

    def _counts(self, key: str) -> Tensor:
        """The same by matrix of the batch."""
        return self._own(key).view(-1)

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self._own("step"))

    def _last(self, step: int) -> int:
        """The step, at or before this one, of the last refresh that its interval has."""
        return step - step % int(self.group["update_proj_gap"])

    def due(self) -> tuple[int, ...]:
        """Matrices that must be decomposed in this step: at every interval, or still owed.

        Of one that is refreshed asynchronously only the first basis.
        """
        taken = self._counts("basis_step").tolist()
        if self.is_async:
            return tuple(i for i, when in enumerate(taken) if when == NO_BASIS)
        last = self._last(self.step)
        return tuple(i for i, when in enumerate(taken) if when == NO_BASIS or when < last)

    def pending(self) -> tuple[int, ...]:
        """Matrices with a snapshot, that have not taken their new bases."""
        return tuple(
            i for i, when in enumerate(self._counts("snapshot_step").tolist()) if when != NO_BASIS
        )

    def ready(self) -> tuple[int, ...]:
        """Matrices that take in this step the bases found from their snapshots."""
        before = self.step - min(self.options.refresh_delay, self.group["update_proj_gap"])
        taken = self._counts("snapshot_step").tolist()
        return tuple(i for i, when in enumerate(taken) if NO_BASIS != when <= before)

    def start(self) -> tuple[int, ...]:
        """Takes a snapshot after a step for which a refresh was due, unless one is pending.

        Returns:
            The matrices to decompose in the background.
        """
        if not self.step or self.pending():
            return ()
        now = self.step - 1
        last = self._last(now)
        taken = self._counts("basis_step").tolist()
        which = tuple(i for i, when in enumerate(taken) if NO_BASIS < when < last)
        if which:
            pairs = (self._views_of(key) for key in (self.snapshot_key, self.first_key))
            for snapshot, moment in zip(*pairs, strict=True):
                snapshot.copy_(moment)
            self._counts("snapshot_step")[list(which)] = float(now)
        return which

    @property
    def snapshot(self) -> Tensor:
        """This rank's elements of the first moment, in compute layout, when it was copied."""
        views = self._views_of(self.snapshot_key)
        return views[0] if len(views) == 1 else torch.cat(views, -2)

    def _views_of(self, key: str) -> list[Tensor]:
        """This part's rows of a moment, piece by piece."""
        elements = storage.local(self.state[key])
        return [elements] if self.plan.separate else self.views(elements)

    def views(self, elements: Tensor) -> list[Tensor]:
        """This part's rows in a tensor (..., m, n) laid out as the parameter is, piece by piece.

        Of a flat weight its range of elements, as rows or columns if that is what they are.
        """
        if isinstance(self.plan.storage, Flat) and self.plan.in_place:
            return [elements.view(self.plan.compute.local_shape(self.mesh.coordinate))]
        if self.plan.seen_as_matrix:
            elements = elements.view(elements.shape[0], math.prod(elements.shape[1:]))
        if self.plan.part is None:
            return [elements]
        spans = self.plan.storage.spans(self.mesh.coordinate) or ((0, 0),)
        return [elements.narrow(-2, start, count) for start, count in spans]

    def rows(self, elements: Tensor) -> Tensor:
        """This part's rows in such a tensor; a view of it if they are in one piece."""
        pieces = self.views(elements)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)

    def set_rows(self, elements: Tensor, rows: Tensor) -> None:
        """Copies this part's rows into a tensor laid out as the parameter is."""
        views = self.views(elements)
        for view, piece in zip(views, _pieces(rows, views), strict=True):
            view.copy_(piece)

    def gradient(self, grad: Tensor) -> Tensor:
        """This part's rows in a gradient, which need not have a kernel's strides."""
        return self.rows(grad.contiguous() if self.plan.seen_as_matrix else grad)

    @property
    def basis(self) -> Tensor:
        """This rank's elements of the basis."""
        return storage.local(self.state[self.basis_key])

    @property
    def first_dtype(self) -> torch.dtype:
        """Dtype of the first moment."""
        return storage.local(self.state[self.first_key]).dtype

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """This rank's elements of the two moments, where they are kept."""
        first, second = (self._views_of(key) for key in (self.first_key, self.second_key))
        return first[0], second[0]

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """This rank's elements of the two moments in compute layout."""
        return self._loaded or self.kept

    def load_moments(self, first: Tensor, second: Tensor) -> None:
        """Takes copies of the moments in compute layout to work on."""
        self._loaded = first, second

    def unload_moments(self) -> tuple[Tensor, Tensor]:
        """Lets go of them, for their way back."""
        moments, self._loaded = self.moments, None
        return moments

    def store_moments(self, first: Tensor, second: Tensor) -> None:
        """Copies the moments back to where they are kept."""
        for kept, moment in zip(self.kept, (first, second), strict=True):
            kept.copy_(moment)

    def project(self, grad: Tensor, basis: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Projects the gradient, in compute layout; into memory of ``scratch`` where given."""
        if not basis.numel():  # there is nothing of it here
            return grad
        dtype = torch.promote_types(basis.dtype, torch.float32)
        out = None if scratch is None else scratch.take(0, grad, dtype)
        return maths.project(grad, basis, self.plan.right, self.options.product_dtype, out)

    def average(self, moment: Tensor, projected: Tensor) -> None:
        """Updates a first moment, or some of it, with the projected gradient there."""
        beta1 = float(self.group["betas"][0])
        rounding = maths.rounding_of(moment, self.step, self.options.stochastic_rounding)
        maths.average_(moment, projected, beta1, rounding)

    def rotate(self, basis: Tensor, projected: Tensor, rotations: dict[int, Tensor]) -> None:
        """Takes the first moment and the projected gradient to a new basis, and keeps the basis.

        Args:
            basis: the whole basis (..., r, r) of this rank's matrices, replaced in place.
            projected: the projected gradient, in compute layout, replaced in place.
            rotations: P (r, r) by place in this rank's batch.
        """
        for place, rotation in rotations.items() if basis.numel() else ():
            for tensor in (self.moments[0], projected):
                maths.rotate_(matrices(tensor)[place], rotation, self.plan.right)
            maths.rotate_(matrices(basis)[place], rotation, right=True)
        kept = self.basis
        if rotations and kept.data_ptr() != basis.data_ptr():  # split: keep our rows of it
            for block in self.plan.basis.blocks(self.mesh.coordinate):
                here, there = block.local[-2], block.start[-2]
                rows = basis.narrow(-2, there, block.shape[-2])
                kept.narrow(-2, here, block.shape[-2]).copy_(rows)

    def advance(
        self,
        basis: Tensor,
        projected: Tensor,
        *,
        averaged: bool = False,
        scratch: Scratch | None = None,
    ) -> Tensor | None:
        """Updates the moments, counts the step and brings the update back.

        Args:
            basis: the whole basis of this rank's matrices.
            projected: the projected gradient, in compute layout; may be overwritten.
            averaged: whether the first moment was updated before, as it is for a refresh.
            scratch: memory to work in, beside its slot 0.

        Returns:
            The update in compute layout, in the dtype it travels in, or None if it was applied,
            which it is wherever storage and compute layout agree.
        """
        hyper, right, dtype = hyper_of(self.group), self.plan.right, self.options.product_dtype
        if not basis.numel():
            self._own("step").add_(1)
            return None if self.plan.in_place else projected.to(self.travel_dtype)
        if averaged:
            y = self.normalise(projected)
        else:
            y = self.average_and_normalise(projected, scratch)
        param = storage.local(self.param)
        multiplied = {y.dtype, basis.dtype, dtype or param.dtype}
        if not self.plan.in_place or multiplied != {param.dtype}:
            # Rounded to the parameter's dtype in every layout, so that all compute the same.
            update = maths.project_back(y, basis, right, dtype).to(self.travel_dtype)
            if not self.plan.in_place:
                return update
            maths.apply_(self.rows(param), update, self.step, hyper)
        elif isinstance(hyper.lr, Tensor):
            update = maths.project_back(y, basis, right)
            maths.apply_(self.rows(param), update, self.step, hyper)
        else:
            maths.project_back_and_apply_(self.rows(param), y, basis, right, self.step, hyper)
        return None

    def average_and_normalise(self, projected: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Updates both moments, counts the step and returns proj(M) / (sqrt(v) + eps).

        Args:
            projected: the projected gradient; may be overwritten.
            scratch: as of :meth:`advance`.
        """
        first, second = self.moments
        if not maths.can_fuse(projected, first, second):
            moments = {"exp_avg": first, self.second_key: second}
            maths.check_alike(self.name, {"gradient": projected, **moments})
            self.average(first, projected)
            return self.normalise(projected)
        self._own("step").add_(1)
        out = None if scratch is None else scratch.take(1, projected, projected.dtype)
        return maths.average_and_normalise_(projected, first, second, hyper_of(self.group), out)

    def normalise(self, projected: Tensor) -> Tensor:
        """Updates the second moment, counts the step and returns proj(M) / (sqrt(v) + eps)."""
        self._own("step").add_(1)
        first, second = self.moments
        rounding = maths.rounding_of(second, self.step, self.options.stochastic_rounding)
        return maths.normalise_(projected, first, second, hyper_of(self.group), rounding)

    def nothing(self, projected: Tensor) -> Tensor | None:
        """Stands in for :meth:`advance` in a step that does not count."""
        dtype = self.travel_dtype
        return None if self.plan.in_place else projected.new_zeros(projected.shape, dtype=dtype)

    def apply(self, update: Tensor) -> None:
        """Adds an update in storage layout to the parameter; the step is already counted."""
        if not self.step:
            return
        hyper, views = hyper_of(self.group), self.views(storage.local(self.param))
        for view, part in zip(views, _pieces(update, views), strict=True):
            maths.apply_(view, part, self.step, hyper)

    def taken(self, matrix: int) -> float:
        """The step at which a matrix of the batch took its basis, or ``NO_BASIS``."""
        return float(self._counts("basis_step")[matrix])

    @property
    def drifts(self) -> bool:
        """Whether this step's refresh has to make the basis orthonormal again, too."""
        if self.options.refresh_method != "orthogonal_iteration" or self.basis.dtype.itemsize < 4:
            return True
        return self.step // int(self.group["update_proj_gap"]) % CORRECTED_EVERY == 0

    def record_outcome(self, matrix: int, outcome: Outcome, in_background: bool) -> str | None:
        """Takes note of what came of a matrix's refresh; the same on all ranks.

        Args:
            matrix: which one of the batch.
            outcome: what came of it.
            in_background: whether it was started in an earlier step.

        Returns:
            What has to be said of it, if it failed.
        """
        when = float(self.step)
        if in_background:
            when = float(self._counts("snapshot_step")[matrix])
            self._counts("snapshot_step")[matrix] = NO_BASIS
        # A momentum that has become zero, as of an expert that gets no tokens any more, has a basis
        # already; a first one is due until there is something to take it from.
        if outcome == Outcome.DONE or (outcome == Outcome.ZERO and self.taken(matrix) != NO_BASIS):
            self._counts("basis_step")[matrix] = when
            self.failures.pop(matrix, None)
        if outcome in (Outcome.DONE, Outcome.ZERO):
            return None
        self.failures[matrix] = self.failures.get(matrix, 0) + 1
        batch = len(self.plan.storage.shape) > 2
        which = f" (matrix {matrix} of the batch)" if batch else ""
        return (
            f"{self.plan.name}{which}: the basis could not be refreshed at step {self.step}, "
            f"because {CAUSES[outcome]}. The old basis is kept. Failure "
            f"{self.failures[matrix]} in a row; the run ends at {MAX_FAILURES}."
        )
