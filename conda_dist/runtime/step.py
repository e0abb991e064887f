"""A step of all weights that a rule steps: one loop over the tasks of the schedule.

While a task is computed, the gradients of the next task are being sent to their compute layout, and
the updates of the previous one back to their storage layout.
"""

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

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
from conda_dist.rules.rule import WeightSlice
from conda_dist.runtime import dtensor
from conda_dist.runtime.agreement import GradientFlags
from conda_dist.runtime.background import Background
from conda_dist.runtime.collectives import Exchange
from conda_dist.runtime.diagnostics import Collection
from conda_dist.runtime.refresh import refresh, start_in_background
from conda_dist.runtime.scratch import Scratch
from conda_dist.runtime.weight import Weight

T = TypeVar("T")
Grads = Mapping[int, Tensor | None]
"""From the index of a weight to its local gradient; None if this rank has none."""
Which = Mapping[int, tuple[int, ...]]
"""From the index of a weight to the indices of some matrices of its batch."""

MAX_SCHEDULES = 64
"""Number of schedules that are cached: one for steps without refreshes, one for steps with them,
and more if different weights have gradients in different steps."""


UNWATCHED = nullcontext()
"""The context of a change that is not measured."""


def _cached(cache: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """The cached value for a key, made now if there is none."""
    if key not in cache:
        if len(cache) == MAX_SCHEDULES:
            cache.clear()
        cache[key] = make()
    return cache[key]


class MatrixPath:
    """All weights of an optimizer that its rule steps.

    Args:
        weights: the weights, in the same order on all ranks.
        options: the optimizer's options.
    """

    def __init__(self, weights: Sequence[Weight], options: Options) -> None:
        self.weights, self.options = tuple(weights), options
        self._plans = [weight.plan for weight in self.weights]
        self._coordinates = {w.plan.topology: w.mesh.coordinate for w in self.weights}
        self._schedules: dict[Hashable, tuple[Task, ...]] = {}
        self._async_refreshes: dict[Hashable, list[AsyncRefresh]] = {}
        self._background = Background()
        self._is_async = options.is_async
        # The shape of what this rank computes of each weight.
        self._shapes = [w.plan.compute.local_shape(w.mesh.coordinate) for w in self.weights]
        # Weights whose gradients are exchanged: they take part in every step, with or without one.
        self._exchanged = [bool(crossed_dims(plan)) for plan in self._plans]
        self.flags = GradientFlags()
        self._collection: Collection | None = None  # of a step that collects diagnostics
        self._products = partial(matmul_precision, "tf32" if options.tf32 else "ieee")

    def step(self, grads: Grads, collection: Collection | None = None) -> None:
        """Takes one step.

        Args:
            grads: for each weight, by index, the local gradient of its parameter, of the
                parameter's local shape. Parts of a weight have the same one. None if this rank has
                no gradient.
            collection: measures the changes of the weights; None in a step that does not collect.

        Raises:
            RuntimeError: a decomposition raised an error, or failed too often in a row; raised on
                all ranks.
        """
        self._collection = collection
        try:
            self._step(grads)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Drops the background decompositions. The next step starts them again from snapshots."""
        self._background.drop()

    def _step(self, grads: Grads) -> None:
        """Finds which matrices are due, gets the step's tasks and runs them."""
        due: dict[int, tuple[int, ...]] = {}
        ready: dict[int, tuple[int, ...]] = {}
        for i, grad in grads.items():
            if grad is not None:
                due[i] = self.weights[i].due()
            elif self._exchanged[i]:
                due[i] = ()
        if self._is_async:
            # Restart the refreshes that were pending in a loaded checkpoint.
            self._start({i: w.pending() for i, w in enumerate(self.weights)})
            ready = {
                i: which
                for i, grad in grads.items()
                if grad is not None and (which := self.weights[i].ready())
            }
        key = tuple(due.items()), tuple(ready.items())
        tasks = _cached(self._schedules, key, lambda: self.plan_step(due, ready))
        self._run(tasks, grads)
        if self._is_async:
            stepped = [i for i, grad in grads.items() if grad is not None]
            self._start({i: self.weights[i].take_snapshot() for i in stepped})

    def plan_step(self, due: Which, ready: Which) -> tuple[Task, ...]:
        """The tasks of a step; see :func:`conda_dist.plan.schedule.plan_step`."""
        dtypes = [weight.exchange_dtype for weight in self.weights]
        limit = self.options.task_bytes
        return plan_step(self._plans, due, ready, self._coordinates, limit, dtypes)

    def _start(self, pending: Which) -> None:
        """Starts to decompose the pending matrices in the background, unless they are started."""
        due = {
            i: which
            for i, which in pending.items()
            if which and (self.weights[i], which[0]) not in self._background
        }
        key = tuple(due.items())
        for plan in _cached(self._async_refreshes, key, lambda: self._plan_async(due)):
            start_in_background(plan, [self.weights[i] for i in plan.weights], self._background)

    def _plan_async(self, due: Which) -> list[AsyncRefresh]:
        """Plans the gather of the momenta of matrices that are decomposed in the background."""
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
        """Runs the tasks one after another, overlapped with the exchanges of their neighbours.

        ``arriving`` is the exchange of the next task's gradients; ``returning`` is the exchange of
        the previous task's updates.
        """
        # The meshes with a weight that has taken a step before this one. The ranks of one mesh find
        # the same, although they may have different weights on other meshes.
        begun = set()
        if tasks and tasks[-1].refreshed:  # tasks with refreshes come last
            begun = {w.plan.topology for w in self.weights if w.step}
        scratch = Scratch()
        arriving = self._forward(tasks[0], grads) if tasks else None
        returning: tuple[Task, Exchange, Container[int]] | None = None
        for k, task in enumerate(tasks):
            assert arriving is not None
            tensors, bases = self._arrived(task, arriving)
            missing = [i for i in task.weights if grads[i] is None] if task.flags else ()
            if task.refreshed:
                # A refresh may raise an error: the previous task's updates must be applied before.
                if returning is not None:
                    self._apply(*returning)
                returning = None
                mine = self._plans[task.weights[0]].topology
                updates = self._refreshing(task, tensors, bases, mine in begun)
                arriving = self._forward(tasks[k + 1], grads) if k + 1 < len(tasks) else None
            else:
                arriving = self._forward(tasks[k + 1], grads) if k + 1 < len(tasks) else None
                with self._products():
                    updates = self._updates(task, tensors, bases, scratch, missing)
            if returning is not None:
                self._apply(*returning)
            returning = None
            if not task.in_place:
                returning = task, self._backward(task, updates), missing
            del updates  # the exchange has packed them: free the memory
        if returning is not None:
            self._apply(*returning)

    def _updates(
        self,
        task: Task,
        grads: list[Tensor],
        bases: list[Tensor],
        scratch: Scratch,
        missing: Container[int],
    ) -> list[Tensor | None]:
        """Computes the updates of a task without a refresh.

        Args:
            task: the task.
            grads: the gradient of each weight, in compute layout. Those of weights that are
                computed are replaced by empty tensors, so that they can be freed one by one.
            bases: the whole basis of each weight; replaced in the same way.
            scratch: memory that weights reuse.
            missing: indices of weights of which this rank has no gradient. Their states are not
                changed.

        Returns:
            See :meth:`conda_dist.runtime.weight.Weight.finish`, for each weight.
        """
        weights = list(map(self.weights.__getitem__, task.weights))
        shapes = list(map(self._shapes.__getitem__, task.weights))
        updates: list[Tensor | None] = [None] * len(weights)
        order: list[int] = []
        others: list[int] = []
        # Those of one shape one after another, so that the rule can compute them together.
        for k in sorted(range(len(weights)), key=shapes.__getitem__):
            computed = weights[k].computes and task.weights[k] not in missing
            (order if computed else others).append(k)

        def begun(positions: Iterable[int]) -> Iterator[WeightSlice]:
            for k in positions:
                reused = scratch if weights[k].in_place else None
                weight = weights[k].begin(bases[k], grads[k], reused)
                grads[k] = bases[k] = weights[k].nothing
                yield weight
                del weight

        rule = self.weights[0].rule  # of all weights
        if self._collection is None:
            for k, (weight, update) in zip(order, rule.update_many(begun(order)), strict=True):
                updates[k] = weights[k].finish(weight, update)
        else:
            for k in order:  # one by one, because each change is measured
                with self._watched(weights[k], weights[k].in_place):
                    (weight,) = begun([k])
                    updates[k] = weights[k].finish(weight, rule.update(weight))
        for k in others:
            updates[k] = weights[k].zero_update(grads[k], task.weights[k] not in missing)
        return updates

    def _watched(self, weight: Weight, changes: bool) -> AbstractContextManager[None]:
        """A context in which a weight may change, measured if this step collects diagnostics."""
        if self._collection is None or not changes:
            return UNWATCHED
        return self._collection.change(weight)

    def _refreshing(
        self, task: Task, grads: list[Tensor], bases: list[Tensor], begun: bool
    ) -> list[Tensor | None]:
        """Refreshes the bases of a task, then computes its updates; ``begun``: see `refresh`."""
        weights = [self.weights[i] for i in task.weights]
        prepared = []
        with self._products():
            for weight, basis in zip(weights, bases, strict=True):
                prepared.append(weight.prepare(grads.pop(0), basis))
        counts = refresh(task, weights, bases, prepared, self._background, begun)
        parts = zip(weights, bases, prepared, counts, strict=True)
        updates = []
        with self._products():
            for weight, basis, grad, counted in parts:
                if not (counted and weight.computes):
                    updates.append(weight.zero_update(grad, counted))
                    continue
                with self._watched(weight, weight.in_place):
                    of_rule = weight.begin(basis, grad, averaged=True)
                    updates.append(weight.finish(of_rule, weight.rule.update(of_rule)))
        return updates

    def _forward(self, task: Task, grads: Grads) -> Exchange:
        """Starts the exchange before a task's update; see :attr:`Task.forward` for its items."""
        tensors: list[Tensor] = []
        bases: list[Tensor] = []
        for i in task.weights:
            weight, given = self.weights[i], grads[i]
            grad = self._zeros(weight) if given is None else weight.gradient(given)
            tensors.append(grad.to(weight.exchange_dtype) if weight.communicates else grad)
            bases.append(weight.basis)
        tensors += bases
        for i in task.loading:
            tensors += self.weights[task.weights[i]].kept_moments
        device, mesh = bases[0].device, self.weights[task.weights[0]].mesh
        for flags in task.flags:
            dtype = self.weights[task.weights[flags.positions[0]]].exchange_dtype
            there = [grads[i] is not None for i in task.weights]
            tensors.append(self.flags.make(flags, there, dtype, device))
        dtypes = [tensor.dtype for tensor in tensors] if task.forward else ()
        return Exchange(mesh, task.forward, tensors, dtypes, device)

    @staticmethod
    def _zeros(weight: Weight) -> Tensor:
        """The zeros that this rank sends instead of a gradient that it does not have."""
        shape = weight.plan.storage.local_shape(weight.mesh.coordinate)
        device = dtensor.local(weight.param).device
        return torch.zeros(shape, dtype=weight.exchange_dtype, device=device)

    def _arrived(self, task: Task, exchange: Exchange) -> tuple[list[Tensor], list[Tensor]]:
        """Waits for that exchange. Returns gradients in compute layout and whole bases."""
        tensors: list[Any] = exchange.wait()
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
        """Starts the exchange after a task's update; see :attr:`Task.backward` for its items."""
        weights = [self.weights[i] for i in task.weights]
        dtypes = [weight.update_dtype for weight in weights]
        for i in task.loading:
            moments = weights[i].unload_moments()
            updates, dtypes = [*updates, *moments], [*dtypes, *(m.dtype for m in moments)]
        extras = [weight.take_extra() for weight in weights if weight.plan.extra_shape is not None]
        updates, dtypes = [*updates, *extras], [*dtypes, *(torch.float32 for _ in extras)]
        device = weights[0].param.device
        return Exchange(weights[0].mesh, task.backward, updates, dtypes, device)

    def _apply(self, task: Task, returning: Exchange, missing: Container[int]) -> None:
        """Waits for that exchange, applies the updates and stores the moments."""
        tensors = returning.wait()
        extras = iter(tensors[len(task.weights) + 2 * len(task.loading) :])
        for i, update in zip(task.weights, tensors, strict=False):
            extra = None if self._plans[i].extra_shape is None else next(extras)
            if update is not None and i not in missing:
                with self._watched(self.weights[i], True):
                    self.weights[i].apply(update, extra)
        arrived = iter(tensors[len(task.weights) :])
        for i, first, second in zip(task.loading, arrived, arrived, strict=False):
            assert first is not None
            assert second is not None
            self.weights[task.weights[i]].store_moments(first, second)
