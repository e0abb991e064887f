"""A step of all weights on the conda path: some alone, some in buckets, some with new bases.

A weight whose shards are whole rows (m >= n) or columns (m < n) steps alone, without a word to
other ranks. The others travel in buckets, one on its way while another is computed. Those due for
a refresh go in waves. An asynchronous refresh is launched after the step it is due in.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from conda_dist import errand
from conda_dist.background import Background
from conda_dist.delegate import Errand, plan_errand
from conda_dist.exchange import Exchange, Mesh
from conda_dist.filling import fill_buckets, fill_waves
from conda_dist.options import Options
from conda_dist.plan import Bucket, plan_bucket
from conda_dist.refresh import launch, refresh
from conda_dist.scratch import Scratch
from conda_dist.waves import Launch, Wave, plan_launch, plan_wave
from conda_dist.weight import Weight

T = TypeVar("T")
Which = Mapping[int, tuple[int, ...]]
"""By index of a weight some matrices of its batch."""

MAX_SCHEDULES = 64
"""Schedules kept: one for steps without refreshes, one for each wave of them, more if gradients
come and go. Where there are more waves, some are planned again, in milliseconds."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one step does.

    Attributes:
        solo: weights that step alone.
        buckets: weights that travel, and keep their bases.
        waves: weights that take new bases.
        errands: weights whose owners multiply, with and without new bases.
    """

    solo: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    waves: tuple[Wave, ...]
    errands: tuple[Errand, ...]


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What was made for this key before, or is made now."""
    if key not in kept:
        if len(kept) == MAX_SCHEDULES:
            kept.clear()
        kept[key] = make()
    return kept[key]


class CondaPath:
    """All weights of an optimizer that are on the conda path.

    Args:
        weights: in the order of the optimizer's parameters, the same on all ranks.
        options: the optimizer's options.
    """

    def __init__(self, weights: Sequence[Weight], options: Options) -> None:
        self.weights, self.options = tuple(weights), options
        self._plans = [weight.plan for weight in self.weights]
        self._schedules: dict[Hashable, Schedule] = {}
        self._launches: dict[Hashable, list[Launch]] = {}
        self._background = Background()

    def step(self, grads: dict[int, Tensor]) -> None:
        """Takes one step.

        Args:
            grads: by index of the weight, this rank's part of its gradient in storage layout.

        Raises:
            RuntimeError: a decomposition raised, or failed too often; on all ranks alike.
        """
        try:
            self._step(grads)
        except BaseException:
            self.drop()  # what is pending is launched anew
            raise

    def drop(self) -> None:
        """Forgets what is being decomposed: it is launched anew, from its snapshots."""
        self._background.drop()

    def _step(self, grads: dict[int, Tensor]) -> None:
        due = {i: self.weights[i].due() for i in grads}
        ready: Which = {}
        # The first bases are not to be had from Gram matrices.
        summed = {i: w for i, which in due.items() if which and (w := self.weights[i].sums(which))}
        if self.options.refresh == "async":
            # What a checkpoint has pending, nobody has launched.
            self._launch({i: w.pending() for i, w in enumerate(self.weights)})
            ready = {i: which for i in grads if (which := self.weights[i].ready())}
        key = tuple(due.items()), tuple(ready.items()), tuple(summed.items())
        schedule = _kept(self._schedules, key, lambda: self.plan_step(due, ready, summed))
        # As of before this step, and mesh by mesh: other ranks may have other weights beside.
        begun = {weight.plan.topology for weight in self.weights if schedule.waves and weight.step}
        self._steady(schedule, grads)
        for wave in schedule.waves:
            mine = self.weights[wave.bucket.weights[0]].plan.topology
            self._refreshing(wave, grads, mine in begun)
        self._errands(schedule.errands, grads)
        if self.options.refresh == "async":
            self._launch({i: self.weights[i].start() for i in grads})

    def _launch(self, pending: Which) -> None:
        """Has those of these matrices decomposed in the background that are not there already."""
        due = {
            i: which
            for i, which in pending.items()
            if which and (self.weights[i], which[0]) not in self._background
        }
        for plan in _kept(self._launches, tuple(due.items()), lambda: self._plan_launch(due)):
            launch(plan, [self.weights[i] for i in plan.weights], self._background)

    def _plan_launch(self, due: Which) -> list[Launch]:
        waves = fill_waves(self._plans, due, self.options.refresh_limit)
        planned = []
        for weights in waves:
            which = [due[i] for i in weights]
            summed = [self.weights[i].sums(w) for i, w in zip(weights, which, strict=True)]
            coordinate = self._mesh(weights).coordinate
            planned.append(plan_launch(self._plans, weights, which, coordinate, summed))
        return planned

    def plan_step(self, due: Which, ready: Which, summed: Which) -> Schedule:
        """Plans a step.

        Args:
            due: for each weight with a gradient the matrices of its batch to be decomposed.
            ready: the matrices that take bases they were launched for in an earlier step.
            summed: those due of which the Gram matrices are summed up.
        """
        plans, options = self._plans, self.options
        taking = {i: (*which, *ready.get(i, ())) for i, which in due.items()}
        steady = [i for i, which in taking.items() if not which]
        fresh = [i for i, which in taking.items() if which]
        travelling = [i for i in steady if plans[i].travels and not plans[i].delegated]
        buckets = fill_buckets(plans, travelling, options.bucket_limit)
        waves = fill_waves(
            plans, (i for i in fresh if not plans[i].delegated), options.refresh_limit
        )
        errands = [
            weights
            for some, limit in ((steady, options.bucket_limit), (fresh, options.refresh_limit))
            for weights in fill_waves(plans, (i for i in some if plans[i].delegated), limit)
        ]

        def planned(plan: Callable[..., T], weights: tuple[int, ...], **limits: int) -> T:
            chosen = ([some.get(i, ()) for i in weights] for some in (ready, summed))
            which, coordinate = [taking[i] for i in weights], self._mesh(weights).coordinate
            return plan(plans, weights, which, coordinate, *chosen, **limits)

        return Schedule(
            tuple(i for i in steady if not plans[i].travels),
            tuple(plan_bucket(plans, b, self._mesh(b).coordinate) for b in buckets),
            tuple(planned(plan_wave, weights, limit=options.bucket_limit) for weights in waves),
            tuple(planned(plan_errand, weights) for weights in errands),
        )

    def _mesh(self, weights: Iterable[int]) -> Mesh:
        return self.weights[next(iter(weights))].mesh

    def _steady(self, schedule: Schedule, grads: dict[int, Tensor]) -> None:
        """The step of the weights that keep their bases."""
        buckets = schedule.buckets
        coming = deque(self._forward(bucket, grads) for bucket in buckets[:1])
        scratch = Scratch()
        for i in schedule.solo:
            self._solo(self.weights[i], grads[i], scratch)
        del scratch
        going: deque[tuple[Bucket, Exchange]] = deque()
        for k, bucket in enumerate(buckets):
            arrived = self._arrived(bucket, coming.popleft())
            coming.extend(self._forward(after, grads) for after in buckets[k + 1 : k + 2])
            updates = self._updates(bucket, *arrived)
            if going:
                self._apply(*going.popleft())
            going.append((bucket, self._backward(bucket, updates)))
            del updates  # they are packed
        if going:
            self._apply(*going.popleft())

    def _updates(
        self, bucket: Bucket, grads: list[Tensor], bases: list[Tensor]
    ) -> list[Tensor | None]:
        """What the gradients of a bucket become, one after another; they are used up."""
        updates: list[Tensor | None] = []
        for i in bucket.weights:
            weight, basis = self.weights[i], bases.pop(0)
            updates.append(weight.advance(basis, weight.project(grads.pop(0), basis)))
        return updates

    def _solo(self, weight: Weight, grad: Tensor, scratch: Scratch) -> None:
        """The step of a weight that needs no other rank."""
        borrows, basis = weight.plan.borrows, weight.basis
        if borrows:
            weight.borrow(*weight.kept)
        update = weight.advance(basis, weight.project(grad, basis, scratch), scratch=scratch)
        if update is not None:
            weight.apply(update)
        if borrows:
            weight.give_back(*weight.return_borrowed())

    def _refreshing(self, wave: Wave, grads: dict[int, Tensor], begun: bool) -> None:
        """The step of weights that take new bases; ``begun``: see :func:`refresh`."""
        bucket = wave.bucket
        weights = [self.weights[i] for i in bucket.weights]
        tensors, bases = self._arrived(bucket, self._forward(bucket, grads))
        projected = [w.project(g, q) for w, g, q in zip(weights, tensors, bases, strict=True)]
        for weight, basis, grad in zip(weights, bases, projected, strict=True):
            if basis.numel():
                weight.average(weight.moments[0], grad)
        counts = refresh(wave, weights, bases, projected, self._background, begun)
        updates = [
            weight.advance(basis, grad, averaged=True) if counted else weight.nothing(grad)
            for weight, basis, grad, counted in zip(weights, bases, projected, counts, strict=True)
        ]
        self._apply(bucket, self._backward(bucket, updates))

    def _errands(self, errands: Sequence[Errand], grads: dict[int, Tensor]) -> None:
        """The step of delegated weights, one errand's gradients on their way during another."""

        def begin(plan: Errand) -> Exchange:
            there = [self.weights[i] for i in plan.weights]
            return errand.send(plan, there, [grads[i] for i in plan.weights])

        coming = deque(begin(plan) for plan in errands[:1])
        going: deque[tuple[list[Weight], Exchange]] = deque()
        for k, plan in enumerate(errands):
            weights, arriving = [self.weights[i] for i in plan.weights], coming.popleft()
            coming.extend(begin(after) for after in errands[k + 1 : k + 2])
            if plan.matrices and going:  # it may raise, on all ranks: no update may be lost
                errand.finish(*going.popleft())
            going.append((weights, errand.run(plan, weights, arriving, self._background)))
            if len(going) > 1:
                errand.finish(*going.popleft())
        if going:
            errand.finish(*going.popleft())

    def _forward(self, bucket: Bucket, grads: dict[int, Tensor]) -> Exchange:
        """Starts gradients to the compute layout, and bases to every rank."""
        weights = [self.weights[i] for i in bucket.weights]
        tensors = [grads[i] for i in bucket.weights] + [w.basis for w in weights]
        device = tensors[-1].device
        tensors += [moment for i in bucket.borrowers for moment in weights[i].kept]
        dtypes = [tensor.dtype for tensor in tensors]
        return Exchange(weights[0].mesh, bucket.forward, tensors, dtypes, device)

    def _arrived(self, bucket: Bucket, exchange: Exchange) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients in compute layout and the whole bases."""
        tensors = [tensor for tensor in exchange.wait() if tensor is not None]
        count = len(bucket.weights)
        arrived = iter(tensors[2 * count :])
        for i, first, second in zip(bucket.borrowers, arrived, arrived, strict=False):
            self.weights[bucket.weights[i]].borrow(first, second)
        return tensors[:count], tensors[count : 2 * count]

    def _backward(self, bucket: Bucket, updates: list[Tensor | None]) -> Exchange:
        """Starts updates to the storage layout."""
        weights = [self.weights[i] for i in bucket.weights]
        dtypes = [weight.param.dtype for weight in weights]
        for i in bucket.borrowers:
            moments = weights[i].return_borrowed()
            updates, dtypes = [*updates, *moments], [*dtypes, *(m.dtype for m in moments)]
        device = weights[0].basis.device
        return Exchange(weights[0].mesh, bucket.backward, updates, dtypes, device)

    def _apply(self, bucket: Bucket, returning: Exchange) -> None:
        tensors = returning.wait()
        for i, update in zip(bucket.weights, tensors, strict=False):
            if update is not None:
                self.weights[i].apply(update)
        arrived = iter(tensors[len(bucket.weights) :])
        for i, first, second in zip(bucket.borrowers, arrived, arrived, strict=False):
            assert first is not None
            assert second is not None
            self.weights[bucket.weights[i]].give_back(first, second)
