"""The seam between the engine and the arithmetic of a step."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from conda_dist.numerics.decomposition import Outcome
from conda_dist.rules.states import RULE_STATES


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A state that a rule keeps of each matrix (m, n).

    Attributes:
        shape: its shape for one matrix, of one dimension or more: (m, n), (r, r), (m,) for a vector
            or (1,) for a number. A batch has one for each matrix.
        dtype: its dtype.
        cut: whether its elements are where the matrix's are, of the same shape. Else every rank
            that computes any of a matrix has a copy of its state.
        identity: whether it starts as the identity, not as zeros.
        optional: whether checkpoints may lack it. Steps do not read it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: bool = False
    identity: bool = False
    optional: bool = False


class Buffers(Protocol):
    """Memory to work in; see :class:`conda_dist.runtime.scratch.Scratch`."""

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of a shape, not initialised, until the slot is taken again."""


@dataclass(slots=True)
class WeightSlice:
    """What a rule works on in a step: a slice of a matrix, or matrices of a batch.

    Attributes:
        name: of the parameter, for errors.
        grad: the gradient (..., m', n'); may be overwritten.
        states: the rule's states by name, updated in place.
        group: the parameter group with the hyperparameters.
        step: how many steps the weight has taken, counting this one.
        shape: (m, n) of the whole matrix. A rule that is not ``whole`` gets rows of it if m >= n,
            else columns.
        param: the elements of the weight itself, if they are the same slice; None if the update
            goes to other ranks.
        buffers: memory to work in, or None.
        averaged: whether a refresh before this step has brought gradient and momentum to a new
            basis already.
        extra: what the rule has to say of it to all that store it, see :meth:`Rule.extra_shape`.
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
        """Whether slices are rows (m >= n)."""
        return self.shape[0] >= self.shape[1]


class Rule(ABC):
    """The arithmetic of an optimizer's steps on matrices, and what the engine must know of it."""

    name: ClassVar[str]
    """The path's name: of a group's ``algorithm``, in reports, plans and checkpoints."""
    title: ClassVar[str]
    """The optimizer's name, for messages."""
    whole: ClassVar[bool] = False
    """Whether it needs a whole matrix on one rank; else it computes slices apart."""
    refreshes: ClassVar[bool] = False
    """Whether it is a :class:`RefreshedRule`."""
    state_names: ClassVar[frozenset[str]] = frozenset()
    """Names of its states and counts that adamw has not, by which they are known."""
    counts: tuple[str, ...] = ()
    """Counts that it keeps of each matrix, beside the engine's own "step"."""
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    """Keys of a group that it reads, beside those that all rules share."""
    factor: ClassVar[str | None] = None
    """The hyperparameter that multiplies ``lr``, for reports, if there is one."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        RULE_STATES.update(cls.state_names)

    @abstractmethod
    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Its states of a matrix (m, n) of a parameter of that dtype, by name."""

    @abstractmethod
    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes in which a gradient goes to a group, and its update back, for a parameter's."""

    def extra_shape(self, m: int, n: int) -> tuple[int, int] | None:
        """Shape of what goes back beside the update of a matrix (m, n), in float32.

        For what :meth:`apply` needs and only :meth:`update` knows, such as a decay that depends on
        the gradient: a number for each column, (1, n), or for the matrix, (1, 1). None: nothing.
        ``update`` leaves it in ``weight.extra``.
        """
        return None

    @abstractmethod
    def update(self, weight: WeightSlice) -> Tensor | None:
        """Updates the states; returns the update, for :meth:`apply`.

        Or None, if ``weight.param`` is there and has been updated already.
        """

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
        """Takes an update off a slice of the weight, decay included.

        Args:
            param: the slice, updated in place; of any rows and columns.
            update: what :meth:`update` returned, for the same elements.
            group: see :class:`WeightSlice`.
            step: see :class:`WeightSlice`.
            shape: see :class:`WeightSlice`.
            extra: see :meth:`extra_shape`; of the columns of the slice.
        """

    def check(self, values: Mapping[str, Any], where: str) -> None:  # noqa: B027 (few need it)
        """Checks those of its hyperparameters that are among ``values``.

        Raises:
            TypeError: one is of the wrong type.
            ValueError: one is out of its range.
        """

    def describe(self, group: Mapping[str, Any]) -> str:
        """Its name, with what ranks must agree on for their exchanges to be the same."""
        return self.name


class RefreshedRule(Rule):
    """A rule that steps in a basis (r, r) of each matrix, which refreshes replace.

    Its states have "basis", and first the momentum, projected, that a refresh decomposes; its
    counts have "basis_step", and where refreshes are asynchronous "snapshot_step", beside an
    optional state "snapshot" like the momentum.
    """

    refreshes = True

    @abstractmethod
    def project(
        self, grad: Tensor, basis: Tensor, right: bool, buffers: Buffers | None = None
    ) -> Tensor:
        """The projected gradient, in the memory of ``buffers`` where given."""

    @abstractmethod
    def average(
        self, momentum: Tensor, projected: Tensor, group: Mapping[str, Any], step: int
    ) -> None:
        """Updates the momentum with the projected gradient, before a refresh.

        :meth:`update` then gets a part that is ``averaged``.
        """

    @abstractmethod
    def refresh(self, momentum: Tensor, right: bool, first: bool) -> tuple[Outcome, Tensor | None]:
        """What came of decomposing a whole projected momentum, and the rotation to a new basis.

        Args:
            momentum: the momentum (m, n).
            right: whether the basis is multiplied from the right.
            first: whether the matrix has no basis yet.
        """
