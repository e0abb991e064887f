"""One weight that a rule steps: its plan, its tensors, and the steps of its refreshes."""

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from conda_dist.layout.flat import Flat
from conda_dist.layout.layout import Layout
from conda_dist.numerics.decomposition import CAUSES, Outcome, Spectrum
from conda_dist.options import Options
from conda_dist.plan import calendar
from conda_dist.plan.calendar import NO_BASIS
from conda_dist.plan.weight_plan import WeightPlan
from conda_dist.rules.rule import RefreshedRule, Rule, StateSpec, WeightSlice
from conda_dist.runtime import dtensor
from conda_dist.runtime.collectives import Mesh
from conda_dist.runtime.scratch import Scratch

MAX_FAILURES = 3  # failed refreshes of one matrix in a row after which all ranks raise an error

CORRECTED_EVERY = 16
"""A refresh by orthogonal iteration makes the basis orthonormal again if the number of intervals so
far is a multiple of this. In between, the basis drifts by less than 5e-6 in float32, measured for r
from 16 to 1024."""


def _pieces(rows: Tensor, views: list[Tensor]) -> tuple[Tensor, ...]:
    """Rows (..., m', n) split into pieces with as many rows as the views have."""
    if len(views) == 1:
        return (rows,)
    return torch.split(rows, [view.shape[-2] for view in views], dim=-2)


class Weight:
    """A weight (..., m, n) that a rule steps, or one part of it (some rows) if it has ``splits``.

    The parts of a weight share its parameter and its state. Counts have an entry for each part, and
    each part has its own copied states, such as "basis_0". If all parts are in place, they share
    the moments: each uses a view of its rows. Otherwise each has its own (``plan.separate``).

    Args:
        param: the parameter; in flat partitions this rank's range of elements, (elements,).
        plan: the plan, the same on all ranks.
        mesh: the ranks that share the weight.
        group: the parameter group, read at every step.
        states: ``optimizer.state``.
        options: the optimizer's options.
        rule: the rule.
    """

    def __init__(
        self,
        param: Tensor,
        plan: WeightPlan,
        mesh: Mesh,
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        options: Options,
        rule: Rule,
    ) -> None:
        self.param, self.plan, self.mesh, self.name = param, plan, mesh, plan.name
        self.group, self.states, self.options = group, states, options
        self.rule = rule
        self.is_async = rule.refreshes and options.is_async  # the first refresh is never async
        self.communicates, self.in_place = plan.communicates, plan.in_place
        self._kernel, flat = plan.seen_as_matrix, isinstance(plan.storage, Flat) and plan.in_place
        # Whether a step works on other shapes or rows than the parameter's local tensor has.
        self._reshaped = flat or self._kernel or plan.part is not None
        self.failures: dict[int, int] = {}  # by matrix, failed refreshes in a row
        self.spectra: dict[int, Spectrum] = {}  # by matrix, of its last refresh, for diagnostics
        self._loaded: tuple[Tensor, ...] | None = None
        self._extra: Tensor | None = None
        m, n = self.shape = plan.storage.shape[-2], plan.storage.shape[-1]
        self.specs: dict[str, StateSpec] = self.rule.states(m, n, param.dtype)
        self.exchange_dtype, self.update_dtype = self.rule.exchange_dtypes(param.dtype)
        of_part = "" if plan.part is None else f"_{plan.part}"
        self.keys = {
            name: f"{name}{of_part if plan.separate or not spec.cut else ''}"
            for name, spec in self.specs.items()
        }
        """From the rule's name of a state to its key in ``optimizer.state[param]``."""
        self.names = {key: name for name, key in self.keys.items()}
        self._cut = [n for n, spec in self.specs.items() if spec.cut and not spec.optional]
        self._cut_keys = [self.keys[name] for name in self._cut]
        self._copied = [n for n, spec in self.specs.items() if not spec.cut and n != "basis"]
        self.bases = rule.bases(m, n)
        """The rule's names of the states that are bases."""
        self.computes = bool(plan.whole_basis.numel(mesh.coordinate))
        """Whether this rank computes any of the weight."""
        self.nothing = dtensor.local(param).new_empty(0)

    @property
    def state(self) -> dict[str, Any]:
        """The parameter's entry of ``optimizer.state``; {} before it is allocated."""
        return self.states.get(self.param, {})

    def state_layouts(self) -> dict[str, Layout]:
        """The layout of each state, by key. Only the first part lists moments that parts share."""
        whole = self.plan.moments if self.plan.separate else self.plan.moments.whole
        shared = bool(self.plan.part) and not self.plan.separate
        return {
            self.keys[name]: whole if spec.cut else self.plan.copied_layout(spec.shape)
            for name, spec in self.specs.items()
            if not (spec.cut and shared)
        }

    def saved_key(self, key: str) -> str:
        """The name of a state in checkpoints, where all parts share the moments."""
        name = self.names[key]
        return name if self.specs[name].cut else key

    @property
    def counts(self) -> tuple[str, ...]:
        """Names of counts in addition to "step". Only the first part lists them."""
        return () if self.plan.part else self.rule.counts

    def init_state(self) -> None:
        """Allocates all missing states at once; existing ones are not changed."""
        layouts = self.state_layouts()
        if "step" in self.state and layouts.keys() <= self.state.keys():
            return
        state = self.states[self.param]
        device = dtensor.local(self.param).device
        parts = () if self.plan.part is None else (len(self.group["splits"]),)
        if not self.plan.part:
            state.setdefault("step", torch.zeros(parts, dtype=torch.float32, device="cpu"))
        for key, layout in layouts.items():
            if key in state:  # who made a flat partition has allocated its moments
                continue
            spec = self.specs[self.names[key]]
            shape = layout.local_shape(self.mesh.coordinate)
            elements = torch.zeros(shape, dtype=spec.dtype, device=device)
            if spec.identity:
                self._set_identity(elements)
            separate = self.plan.separate  # then a plain tensor, else wrapped like the parameter
            state[key] = elements if separate else dtensor.like(self.param, layout, elements)
            # torchtitan loads only the states whose names it finds in optimizer.state.
            state.setdefault(self.saved_key(key), elements.new_empty(0))
        taken = (*parts, *self.plan.storage.shape[:-2])
        for name in self.counts:
            state[name] = torch.full(taken, NO_BASIS, dtype=torch.float32, device="cpu")

    def _set_identity(self, elements: Tensor) -> None:
        """Sets this rank's rows of a basis of zeros to rows of the identity."""
        for block in self.plan.basis.blocks(self.mesh.coordinate):
            rows = torch.arange(block.shape[-2], device=elements.device)
            elements[..., block.local[-2] + rows, block.start[-2] + rows] = 1

    def _own(self, key: str) -> Tensor:
        """This part's entry of "step", (), or its entries of "basis_step", (...); a view."""
        counts: Tensor = self.states[self.param][key]
        return counts if self.plan.part is None else counts[self.plan.part]

    def _counts(self, key: str) -> list[float]:
        """This part's entries of "basis_step" or "snapshot_step", one for each matrix."""
        return self._own(key).view(-1).tolist()

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return int(self._own("step"))

    @property
    def interval(self) -> int:
        """Number of steps between refreshes."""
        return int(self.group["update_proj_gap"])

    def due(self) -> tuple[int, ...]:
        """The matrices to decompose in this step; see :func:`conda_dist.plan.calendar.due`."""
        if not self.rule.refreshes:
            return ()
        taken, step = self._counts("basis_step"), int(self._own("step"))
        return calendar.due(taken, step, int(self.group["update_proj_gap"]), self.is_async)

    def pending(self) -> tuple[int, ...]:
        """The matrices that have a snapshot and have not taken the new basis yet."""
        return calendar.pending(self._counts("snapshot_step"))

    def ready(self) -> tuple[int, ...]:
        """The matrices that take, in this step, the new basis of their snapshot."""
        delay = self.options.refresh_delay
        return calendar.ready(self._counts("snapshot_step"), self.step, self.interval, delay)

    def steps_to_refresh(self) -> float:
        """Number of steps of this weight before its next one with a refresh; 0 if that is next."""
        if not self.rule.refreshes:
            return math.inf
        taken, delay = self._counts("basis_step"), self.options.refresh_delay
        snapshots = self._counts("snapshot_step") if self.is_async else ()
        return calendar.steps_to_next(taken, snapshots, self.step, self.interval, delay)

    def take_snapshot(self) -> tuple[int, ...]:
        """Copies the momentum to the snapshot, after a step at which a refresh was due.

        Returns:
            The matrices to decompose in the background; () if a refresh is still pending.
        """
        if not self.step or self.pending():
            return ()
        which = calendar.to_start(self._counts("basis_step"), self.step - 1, self.interval)
        if which:
            pairs = (self._views_of(name) for name in ("snapshot", self._cut[0]))
            for snapshot, moment in zip(*pairs, strict=True):
                snapshot.copy_(moment)
            self._own("snapshot_step").view(-1)[list(which)] = float(self.step - 1)
        return which

    @property
    def snapshot(self) -> Tensor:
        """This rank's slice of the snapshot of the first moment, in compute layout."""
        views = self._views_of("snapshot")
        return views[0] if len(views) == 1 else torch.cat(views, -2)

    def _views_of(self, name: str) -> list[Tensor]:
        """Views of this part's rows in a moment, one for each contiguous piece."""
        elements = dtensor.local(self.states[self.param][self.keys[name]])
        if self.plan.separate or not self._reshaped:
            return [elements]
        return self.views(elements)

    def views(self, elements: Tensor) -> list[Tensor]:
        """Views (..., m', n') of this part's rows in a local tensor with the parameter's layout.

        One for each contiguous piece; also of a flat local tensor, if the weight is in place.
        """
        if isinstance(self.plan.storage, Flat) and self.plan.in_place:
            return [elements.view(self.plan.compute.local_shape(self.mesh.coordinate))]
        if self._kernel:
            elements = elements.view(elements.shape[0], math.prod(elements.shape[1:]))
        if self.plan.part is None:
            return [elements]
        spans = self.plan.storage.spans(self.mesh.coordinate) or ((0, 0),)
        return [elements.narrow(-2, start, count) for start, count in spans]

    def rows(self, elements: Tensor) -> Tensor:
        """This part's rows in such a tensor: a view if they are in one piece, else a copy."""
        if not self._reshaped:
            return elements
        pieces = self.views(elements)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)

    def set_rows(self, elements: Tensor, rows: Tensor) -> None:
        """Copies ``rows`` to this part's rows in a local tensor with the parameter's layout."""
        views = self.views(elements)
        for view, piece in zip(views, _pieces(rows, views), strict=True):
            view.copy_(piece)

    def gradient(self, grad: Tensor) -> Tensor:
        """This part's rows in a local gradient. A kernel's gradient is made contiguous first."""
        return self.rows(grad.contiguous() if self._kernel else grad) if self._reshaped else grad

    @property
    def basis(self) -> Tensor:
        """This rank's elements of the state "basis", as they are kept; empty without that state."""
        if "basis" not in self.specs:
            return self.nothing
        return dtensor.local(self.states[self.param][self.keys["basis"]])

    @property
    def first_dtype(self) -> torch.dtype:
        """Dtype of the first moment."""
        return self.specs[self._cut[0]].dtype

    @property
    def momentum(self) -> list[Tensor]:
        """Views of this rank's elements of the first moment, in the layout in which it is kept."""
        return self._views_of(self._cut[0])

    @property
    def kept_moments(self) -> tuple[Tensor, ...]:
        """This rank's elements of the moments, in the layout in which they are kept."""
        if self._reshaped:
            return tuple([self._views_of(name)[0] for name in self._cut])
        state = self.states[self.param]
        return tuple(map(dtensor.local, map(state.__getitem__, self._cut_keys)))

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """This rank's elements of the moments in compute layout."""
        return self._loaded or self.kept_moments

    def load_moments(self, *moments: Tensor) -> None:
        """Sets copies of the moments, in compute layout, on which this step works."""
        self._loaded = moments

    def unload_moments(self) -> tuple[Tensor, ...]:
        """Returns these copies, to be sent back, and drops them."""
        moments, self._loaded = self.moments, None
        return moments

    def store_moments(self, *moments: Tensor) -> None:
        """Copies new moments into the kept ones."""
        for kept, moment in zip(self.kept_moments, moments, strict=True):
            kept.copy_(moment)

    @property
    def refreshed_rule(self) -> RefreshedRule:
        """The rule, if it is a :class:`RefreshedRule`."""
        assert isinstance(self.rule, RefreshedRule)
        return self.rule

    def prepare(self, grad: Tensor, basis: Tensor) -> Tensor:
        """Averages a gradient in compute layout before a refresh; see `RefreshedRule.prepare`.

        Args:
            grad: the gradient.
            basis: the whole state "basis" (..., r, r) of this rank's matrices, if there is one.
        """
        return self.refreshed_rule.prepare(self.begin(basis, grad)) if self.computes else grad

    @property
    def rotation_dtype(self) -> torch.dtype:
        """The dtype of rotations: at least float32, so that only the new basis is rounded."""
        return torch.promote_types(self.specs[self.bases[0]].dtype, torch.float32)

    def begin(
        self, basis: Tensor, grad: Tensor, scratch: Scratch | None = None, averaged: bool = False
    ) -> WeightSlice:
        """What the rule gets in this step, to be followed by :meth:`finish`.

        Args:
            basis: the whole state "basis" (..., r, r) of this rank's matrices, if there is one.
            grad: the gradient in compute layout; if ``averaged``, what :meth:`prepare` returned.
            scratch: memory to reuse, or None.
            averaged: whether :meth:`prepare` has averaged the gradient in this step.
        """
        states = dict(zip(self._cut, self._loaded or self.kept_moments, strict=True))
        if "basis" in self.specs:
            states["basis"] = basis
        for name in self._copied:
            states[name] = dtensor.local(self.states[self.param][self.keys[name]])
        param = dtensor.local(self.param) if self.in_place else None
        if param is not None and self._reshaped:
            param = self.rows(param)
        group, step, shape = self.group, int(self._own("step")) + 1, self.shape
        return WeightSlice(self.name, grad, states, group, step, shape, param, scratch, averaged)

    def finish(self, weight: WeightSlice, update: Tensor | None) -> Tensor | None:
        """Counts the step, and applies the rule's update if the weight is in place.

        Args:
            weight: what :meth:`begin` returned.
            update: what the rule returned for it.

        Returns:
            The update in compute layout and in the dtype in which it is exchanged; None if the
            weight is in place, because then the update has been applied to the parameter.
        """
        self._extra = weight.extra
        self._own("step").add_(1)
        weight.grad, weight.states = self.nothing, {}  # whoever holds the slice keeps no tensors
        if update is None:
            return None
        # Round even if nothing is exchanged, so that all layouts compute the same.
        update = update.to(self.update_dtype)
        if weight.param is None:
            return update
        extra = self.take_extra()
        self.rule.apply(weight.param, update, self.group, weight.step, self.shape, extra)
        return None

    def take_extra(self) -> Tensor | None:
        """Returns the extra tensor of the last update, and drops it; None without one."""
        extra, self._extra = self._extra, None
        return extra

    def zero_update(self, projected: Tensor, counted: bool = False) -> Tensor | None:
        """Zeros if this rank does not compute the weight or has no gradient; None in place.

        ``counted``: whether the weight takes a step, on the ranks that compute it.
        """
        if counted:
            self._own("step").add_(1)
        shape, dtype = projected.shape, self.update_dtype
        return None if self.in_place else projected.new_zeros(shape, dtype=dtype)

    def apply(self, update: Tensor, extra: Tensor | None = None) -> None:
        """Applies an update in storage layout to the parameter, after :meth:`finish`."""
        if not self.step:
            return
        step, views = self.step, self.views(dtensor.local(self.param))
        for view, piece in zip(views, _pieces(update, views), strict=True):
            self.rule.apply(view, piece, self.group, step, self.shape, extra)

    def basis_steps(self) -> list[float]:
        """For each matrix the step at which it took its basis; ``NO_BASIS`` if it has none."""
        return self._counts("basis_step")

    def basis_step(self, matrix: int) -> float:
        """The entry of :meth:`basis_steps` of a matrix of the batch."""
        return self._counts("basis_step")[matrix]

    @property
    def must_orthonormalise(self) -> bool:
        """Whether this step's refresh must also make the basis orthonormal again."""
        kept = self.specs[self.bases[0]].dtype
        if self.options.refresh_method != "orthogonal_iteration" or kept.itemsize < 4:
            return True
        return self.step // self.interval % CORRECTED_EVERY == 0

    def record_outcome(self, matrix: int, outcome: Outcome, in_background: bool) -> str | None:
        """Records the outcome of a matrix's refresh; all ranks record the same.

        Args:
            matrix: index of the matrix in the batch.
            outcome: the outcome.
            in_background: whether the refresh was started in an earlier step.

        Returns:
            The text of a warning if the refresh failed, else None.
        """
        when = float(self.step)
        if in_background:
            when = self._counts("snapshot_step")[matrix]
            self._own("snapshot_step").view(-1)[matrix] = NO_BASIS
        # If the momentum is zero but the matrix has a basis, this counts as a refresh: so it is for
        # an expert that gets no tokens any more. Without a basis the matrix stays due.
        has_basis = self.basis_step(matrix) != NO_BASIS
        if outcome == Outcome.DONE or (outcome == Outcome.ZERO and has_basis):
            self._own("basis_step").view(-1)[matrix] = when
            self.failures.pop(matrix, None)
        if outcome in (Outcome.DONE, Outcome.ZERO):
            return None
        self.failures[matrix] = self.failures.get(matrix, 0) + 1
        which = f" (matrix {matrix} of the batch)" if len(self.plan.storage.shape) > 2 else ""
        decomposed = self.refreshed_rule.decomposed
        return (
            f"{self.plan.name}{which}: the basis could not be refreshed at step {self.step}, "
            f"because {CAUSES[outcome].format(decomposed)}. The old basis is kept. Failure "
            f"{self.failures[matrix]} in a row; the run ends at {MAX_FAILURES}."
        )
