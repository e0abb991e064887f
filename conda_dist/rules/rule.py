"""The interface between the engine and the arithmetic of a step: :class:`Rule`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from conda_dist.numerics.decomposition import Found
from conda_dist.rules.states import RULE_STATES


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A state that a rule keeps for each matrix (m, n).

    Attributes:
        shape: shape for one matrix, of at least one dimension: (m, n), (r, r), (m,) for a vector or
            (1,) for a number. A batch of matrices has the batch dimensions before it.
        dtype: dtype of the state.
        cut: True for a state of shape (m, n) that is cut like the matrix: a rank holds the elements
            of the rows or columns that it computes. False for a copied state: every rank that
            computes any of the matrix holds all of it.
        identity: whether the state is initialized to the identity instead of zeros.
        optional: whether checkpoints may lack the state. :meth:`Rule.update` does not read it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: bool = False
    identity: bool = False
    optional: bool = False


class Buffers(Protocol):
    """Reusable memory; implemented by :class:`conda_dist.runtime.scratch.Scratch`."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous uninitialized tensor, valid until the next call."""


@dataclass(slots=True)
class WeightSlice:
    """What a rule works on in a step: a slice of a matrix, or slices of the matrices of a batch.

    For m >= n the slice is some rows, (..., m', n); else some columns, (..., m, n'). If the rule is
    ``whole``, it is the whole matrix.

    Attributes:
        name: fully qualified name of the parameter, for errors.
        grad: the gradient of the slice. It may be the parameter's own, so a rule must not change
            it. If ``averaged``, it is what the rule itself has returned.
        states: the rule's states by name, to be updated in place.
        group: the parameter group, with the hyperparameters.
        step: number of steps that the weight has taken, this one included.
        shape: (m, n) of the whole matrix.
        param: the slice of the weight, if this rank stores it; None if the update goes to the ranks
            that store it.
        buffers: reusable memory, or None.
        averaged: whether :meth:`RefreshedRule.prepare` has averaged the gradient in this step; then
            ``grad`` is what it returned.
        extra: set by the rule: the extra tensor, see :meth:`Rule.extra_shape`.
    """

    name: str
    grad: Tensor
    states: Mapping[str, Tensor]
    group: Mapping[str, Any]
    step: int
    shape: tuple[int, int]
    param: Tensor | None = None
    buffers: Buffers | None = None
    averaged: bool = False
    extra: Tensor | None = None

    @property
    def right(self) -> bool:
        """Whether slices are rows, and the basis is multiplied from the right (m >= n)."""
        return self.shape[0] >= self.shape[1]


class Rule(ABC):
    """The arithmetic of an optimizer of matrices, and what the engine must know about it."""

    name: ClassVar[str]
    """The name of the path: in a group's ``algorithm``, in reports, plans and checkpoints."""
    title: ClassVar[str]
    """The optimizer's name in messages."""
    whole: ClassVar[bool] = False
    """Whether the rule needs a whole matrix on one rank; else it computes each slice by itself."""
    refreshes: ClassVar[bool] = False
    """Whether the rule is a :class:`RefreshedRule`."""
    state_names: ClassVar[frozenset[str]] = frozenset()
    """Names of the states and counts that adamw does not have. They tell whose state it is."""
    counts: tuple[str, ...] = ()
    """Names of the counts that the rule keeps of each matrix, in addition to "step"."""
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    """Keys of a group that the rule reads, in addition to those that all rules share."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that checkpoints of earlier versions lack. A group that loads such a
    checkpoint keeps its own values of them."""
    factor: ClassVar[str | None] = None
    """The hyperparameter that multiplies ``lr``, for reports; None without one."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        RULE_STATES.update(cls.state_names)

    @abstractmethod
    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The states of a matrix (m, n), by name; ``dtype`` is the parameter's."""

    @abstractmethod
    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes in which gradients and updates are exchanged.

        Args:
            dtype: the parameter's dtype.

        Returns:
            The dtype of a gradient on its way to the compute layout, and of an update on its way
            back.
        """

    def extra_shape(self, m: int, n: int) -> tuple[int, int] | None:
        """Shape of the extra tensor (float32) that goes with the update of a matrix (m, n).

        It carries what :meth:`apply` needs and only :meth:`update` can compute, such as a decay
        that depends on the gradient: a number for each column, (1, n), or one number, (1, 1).
        ``update`` stores it in ``weight.extra``, with the batch dimensions before it.

        Returns:
            The shape for one matrix; None if there is no extra tensor.
        """
        return None

    def bases(self, m: int, n: int) -> tuple[str, ...]:
        """Names of the states that are bases (r, r) of a matrix (m, n), see RefreshedRule."""
        return ()

    @abstractmethod
    def update(self, weight: WeightSlice) -> Tensor | None:
        """Updates the states in place, and computes the update of the slice.

        Args:
            weight: the slice.

        Returns:
            The update, of the shape of ``weight.grad``, to be passed to :meth:`apply`. None if the
            rule has updated ``weight.param`` itself.
        """

    def update_many(
        self, weights: Iterable[WeightSlice]
    ) -> Iterator[tuple[WeightSlice, Tensor | None]]:
        """:meth:`update` of several slices, in which a rule may share kernels between them.

        Args:
            weights: the slices. Neighbours have one shape where that is possible. They are made as
                they are taken, so a rule decides how many there are at a time; it may take further
                ones before it yields the first.

        Yields:
            Each slice with its update, in the same order. The caller applies and counts it before
            it asks for the next.
        """
        for weight in weights:
            yield weight, self.update(weight)

    @abstractmethod
    def apply(
        self,
        param: Tensor,
        update: Tensor,
        group: Mapping[str, Any],
        step: int,
        shape: tuple[int, int],
        extra: Tensor | None = None,
    ) -> None:
        """Subtracts an update from some elements of the weight, and applies weight decay.

        Args:
            param: elements of the weight (..., m', n'), any rows and columns; updated in place.
            update: what :meth:`update` returned for the same elements.
            group: see :class:`WeightSlice`.
            step: see :class:`WeightSlice`.
            shape: see :class:`WeightSlice`.
            extra: the extra tensor, (..., 1, n') or (..., 1, 1), see :meth:`extra_shape`.
        """

    def check(self, values: Mapping[str, Any], where: str) -> None:  # noqa: B027 (few need it)
        """Checks the rule's own hyperparameters, as far as ``values`` has them.

        Args:
            values: hyperparameters by name.
            where: what to put before a name in an error.

        Raises:
            TypeError: a hyperparameter has the wrong type.
            ValueError: a hyperparameter is out of its range.
        """

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the rule's update beside its rate, by name, for reports."""
        names = (name for name in self.hyperparameters if name != self.factor)
        return {name: group[name] for name in names if name in group}

    def describe(self, group: Mapping[str, Any]) -> str:
        """The rule's name and those hyperparameters that must be equal on all ranks.

        Ranks compare this text. It has what decides when they exchange something.
        """
        return self.name


class RefreshedRule(Rule):
    """A rule that steps in bases (r, r) of each matrix. A refresh rotates them to new ones.

    One rank decomposes a matrix, and sends the rotations to all that compute any of it. Bases are
    copied states that are initialized to the identity. One count is "basis_step", the step at which
    a matrix took its bases. If refreshes are asynchronous, there is also an optional state
    "snapshot" (m, n), a copy of the momentum, and a count "snapshot_step".
    """

    refreshes = True
    decomposed: ClassVar[str] = "momentum"
    """What a refresh decomposes, in messages."""

    @abstractmethod
    def prepare(self, weight: WeightSlice) -> Tensor:
        """Averages the gradient, in place, in what the refresh of this step decomposes.

        Args:
            weight: the slice, as for :meth:`update`.

        Returns:
            The gradient that :meth:`update` gets after the refresh, in a slice that is
            ``averaged``.
        """

    @abstractmethod
    def sources(self, states: Mapping[str, Tensor], place: int) -> tuple[Tensor, ...]:
        """What a refresh of one matrix decomposes, from the states of a rank that computes it.

        If the rule is not ``whole``, the first source is this rank's part of the projected
        momentum, and the ranks' parts are gathered.

        Args:
            states: the rule's states of the batch, by name.
            place: index of the matrix in the batch.
        """

    @abstractmethod
    def refresh(self, sources: Sequence[Sequence[Tensor]], right: bool, first: bool) -> list[Found]:
        """Decomposes some matrices.

        Args:
            sources: the whole sources of each matrix, of one shape, dtype and device; no more than
                :meth:`refreshed_together` allows.
            right: whether the bases are multiplied from the right.
            first: whether the matrices have no bases yet (they are the identity).

        Returns:
            For each matrix the outcome; the rotations P from the bases Q to the new bases Q P if
            the outcome is ``DONE``; and then the spectrum, if the options ask for diagnostics and
            the rule finds it.
        """

    def refreshed_together(self, source: Tensor, first: bool) -> int:
        """How many matrices with a first source like this one :meth:`refresh` may decompose."""
        return 1

    def leave_out(self, states: Mapping[str, Tensor], place: int) -> None:
        """Changes the states of a matrix that had no bases before the refresh of this step."""
