"""A step of all weights on the conda path: one loop over the tasks of its schedule.

While one task is computed, the gradients of the next are on their way to it, and the updates of the
one before on their way back.
"""

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from conda_dist.numerics.precision import matmul_precision
from conda_dist.options import Options
from conda_dist.plan.schedule import (
    AsyncRefresh,
    Task,
    crossed_dims,
    fill_tasks,
    plan_async_refresh,
    plan_step,
)
from conda_dist.runtime import dtensor
from conda_dist.runtime.agreement import GradientFlags
from conda_dist.runtime.background import Background
from conda_dist.runtime.collectives import Exchange
from conda_dist.runtime.refresh import refresh, start_in_background
from conda_dist.runtime.scratch import Scratch
from conda_dist.runtime.weight import Weight

T = TypeVar("T")
Grads = Mapping[int, Tensor | None]
"""By index of a weight this rank's part of its gradient, if there is one."""
Which = Mapping[int, tuple[int, ...]]
"""By index of a weight some matrices of its batch."""

MAX_SCHEDULES = 64
"""Schedules kept: one for steps without refreshes, one for those with, more if gradients come and
go."""


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What was made for this key before, or is made now."""
    if key not in kept:
        if len(kept) == MAX_SCHEDULES:
            kept.clear()
        kept[key] = make()
    return kept[key]


class MatrixPath:
    """All weights of an optimizer that are on the conda path.

    Args:
        weights: in the order of the optimizer's parameters, the same on all ranks.
        options: the optimizer's options.
    """

    def __init__(self, weights: Sequence[Weight], options: Options) -> None:
        self.weights, self.options = tuple(weights), options
        self._plans = [weight.plan for weight in self.weights]
        self._coordinates = {w.plan.topology: w.mesh.coordinate for w in self.weights}
        self._schedules: dict[Hashable, tuple[Task, ...]] = {}
        self._async_refreshes: dict[Hashable, list[AsyncRefresh]] = {}
        self._background = Background()
        # Their exchanges are the same whether there is a gradient or not.
        self._exchanged = [bool(crossed_dims(plan)) for plan in self._plans]
        self.flags = GradientFlags()
        self._products = partial(matmul_precision, "tf32" if options.tf32 else "ieee")

    def step(self, grads: Grads) -> None:
        """Takes one step.

        Args:
            grads: by index of the weight, this rank's part of its gradient: of the parameter's
                local shape; of a weight in parts, the same for each. None where it has none.

        Raises:
            RuntimeError: a decomposition raised, or failed too often; on all ranks alike.
        """
        try:
            self._step(grads)
        except BaseException:
            self.drop()  # what is pending is started anew
            raise

    def drop(self) -> None:
        """Forgets what is being decomposed: it is started anew, from its snapshots."""
        self._background.drop()

    def _step(self, grads: Grads) -> None:
        there = [i for i, grad in grads.items() if grad is not None]
        due = {
            i: () if grad is None else self.weights[i].due()
            for i, grad in grads.items()
            if grad is not None or self._exchanged[i]
        }
        ready: Which = {}
        if self.options.is_async:
            # Restart the refreshes that were pending in a loaded checkpoint.
            self._start({i: w.pending() for i, w in enumerate(self.weights)})
            ready = {i: which for i in there if (which := self.weights[i].ready())}
        key = tuple(due.items()), tuple(ready.items())
        tasks = _kept(self._schedules, key, lambda: self.plan_step(due, ready))
        self._run(tasks, grads)
        if self.options.is_async:
            self._start({i: self.weights[i].start() for i in there})

    def plan_step(self, due: Which, ready: Which) -> tuple[Task, ...]:
        """The tasks of a step; see :func:`conda_dist.plan.schedule.plan_step`."""
        dtypes = [weight.exchange_dtype for weight in self.weights]
        limit = self.options.task_bytes
        return plan_step(self._plans, due, ready, self._coordinates, limit, dtypes)

    def _start(self, pending: Which) -> None:
        """Has those of these matrices decomposed in the background that are not there already."""
        due = {
            i: which
            for i, which in pending.items()
            if which and (self.weights[i], which[0]) not in self._background
        }
        for plan in _kept(self._async_refreshes, tuple(due.items()), lambda: self._plan_async(due)):
            start_in_background(plan, [self.weights[i] for i in plan.weights], self._background)

    def _plan_async(self, due: Which) -> list[AsyncRefresh]:
        return [
            plan_async_refresh(
                self._plans,
                weights,
                [due[i] for i in weights],
                self._coordinates[self._plans[weights[0]].topology],
            )
            for weights in fill_tasks(self._plans, due, self.options.task_bytes, refreshing=True)
        ]

    def _run(self, tasks: Sequence[Task], grads: Grads) -> None:
        """Carries the tasks out, one after another, with the exchanges of their neighbours."""
        # As of before this step, and mesh by mesh: other ranks may have other weights beside.
        refreshing = any(task.matrices for task in tasks)
        begun = {w.plan.topology for w in self.weights if refreshing and w.step}
        scratch = Scratch()
        coming = self._forward(tasks[0], grads) if tasks else None
        going: tuple[Task, Exchange, Container[int]] | None = None
        for k, task in enumerate(tasks):
            assert coming is not None
            tensors, bases = self._arrived(task, coming)
            missing = {i for i in task.weights if grads[i] is None}
            if task.matrices:
                # It may raise, on all ranks: no update may be lost then, nor be under way.
                if going is not None:
                    self._apply(*going)
                going = None
                mine = self._plans[task.weights[0]].topology
                updates = self._refreshing(task, tensors, bases, mine in begun)
                coming = self._forward(tasks[k + 1], grads) if k + 1 < len(tasks) else None
            else:
                coming = self._forward(tasks[k + 1], grads) if k + 1 < len(tasks) else None
                with self._products():
                    updates = self._updates(task, tensors, bases, scratch, missing)
            if going is not None:
                self._apply(*going)
            going = task, self._backward(task, updates), missing
            del updates  # they are packed
        if going is not None:
            self._apply(*going)

    def _updates(
        self,
        task: Task,
        grads: list[Tensor],
        bases: list[Tensor],
        scratch: Scratch,
        missing: Container[int],
    ) -> list[Tensor | None]:
        """What the gradients of a task become, one after another; they are used up.

        Of a weight in ``missing`` this rank has no gradient, and leaves its state alone.
        """
        updates: list[Tensor | None] = []
        for i in task.weights:
            weight = self.weights[i]
            if i in missing:
                updates.append(weight.nothing(grads.pop(0)))
                bases.pop(0)
                continue
            reused = scratch if weight.plan.in_place else None
            updates.append(weight.advance(bases.pop(0), grads.pop(0), scratch=reused))
        return updates

    def _refreshing(
        self, task: Task, grads: list[Tensor], bases: list[Tensor], begun: bool
    ) -> list[Tensor | None]:
        """The updates of weights that take new bases; ``begun``: see :func:`refresh`."""
        weights = [self.weights[i] for i in task.weights]
        projected = []
        with self._products():
            for weight, basis in zip(weights, bases, strict=True):
                projected.append(weight.project(grads.pop(0), basis))
                if weight.computes:
                    weight.average(weight.moments[0], projected[-1])
        counts = refresh(task, weights, bases, projected, self._background, begun)
        parts = zip(weights, bases, projected, counts, strict=True)
        with self._products():
            return [
                weight.advance(basis, grad, averaged=True) if counted else weight.nothing(grad)
                for weight, basis, grad, counted in parts
            ]

    def _forward(self, task: Task, grads: Grads) -> Exchange:
        """Starts gradients to the compute layout, and split bases to every rank."""
        weights = [self.weights[i] for i in task.weights]
        given = [grads[i] for i in task.weights]
        tensors = [
            self._zeros(weight) if grad is None else weight.gradient(grad)
            for weight, grad in zip(weights, given, strict=True)
        ]
        tensors = [
            grad.to(w.exchange_dtype) if w.plan.communicates else grad
            for grad, w in zip(tensors, weights, strict=True)
        ]
        tensors += [weight.basis for weight in weights]
        tensors += [moment for i in task.loading for moment in weights[i].kept]
        device = tensors[len(weights)].device
        there = [grad is not None for grad in given]
        for flags in task.flags:
            dtype = weights[flags.positions[0]].exchange_dtype
            tensors.append(self.flags.make(flags, there, dtype, device))
        dtypes = [tensor.dtype for tensor in tensors]
        return Exchange(weights[0].mesh, task.forward, tensors, dtypes, device)

    @staticmethod
    def _zeros(weight: Weight) -> Tensor:
        """What travels in the place of a gradient that this rank does not have."""
        shape = weight.plan.storage.local_shape(weight.mesh.coordinate)
        device = dtensor.local(weight.param).device
        return torch.zeros(shape, dtype=weight.exchange_dtype, device=device)

    def _arrived(self, task: Task, exchange: Exchange) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients in compute layout and the whole bases."""
        tensors = [tensor for tensor in exchange.wait() if tensor is not None]
        count = len(task.weights)
        arrived = iter(tensors[2 * count :])
        for i, first, second in zip(task.loading, arrived, arrived, strict=False):
            self.weights[task.weights[i]].load_moments(first, second)
        mesh = self.weights[task.weights[0]].mesh
        for flags, values in zip(task.flags, arrived, strict=True):
            names = tuple(self._plans[task.weights[i]].name for i in flags.positions)
            self.flags.keep(mesh, flags, names, values)
        return tensors[:count], tensors[count : 2 * count]

    def _backward(self, task: Task, updates: list[Tensor | None]) -> Exchange:
        """Starts updates to the storage layout."""
        weights = [self.weights[i] for i in task.weights]
        dtypes = [weight.update_dtype for weight in weights]
        for i in task.loading:
            moments = weights[i].unload_moments()
            updates, dtypes = [*updates, *moments], [*dtypes, *(m.dtype for m in moments)]
        beside = [weight.take_beside() for weight in weights if weight.plan.beside is not None]
        updates, dtypes = [*updates, *beside], [*dtypes, *(torch.float32 for _ in beside)]
        device = weights[0].param.device
        return Exchange(weights[0].mesh, task.backward, updates, dtypes, device)

    def _apply(self, task: Task, returning: Exchange, missing: Container[int]) -> None:
        tensors = returning.wait()
        beside = iter(tensors[len(task.weights) + 2 * len(task.loading) :])
        for i, update in zip(task.weights, tensors, strict=False):
            here = None if self._plans[i].beside is None else next(beside)
            if update is not None and i not in missing:
                self.weights[i].apply(update, here)
        arrived = iter(tensors[len(task.weights) :])
        for i, first, second in zip(task.loading, arrived, arrived, strict=False):
            assert first is not None
            assert second is not None
            self.weights[task.weights[i]].store_moments(first, second)
