"""Checks that all ranks have gradients of the same parameters.

There are two checks. If gradients are exchanged, a rank without a gradient sends zeros, and flags
go with the gradients: all receivers read them at the start of the next step, so no rank waits for
them. Before every step that may refresh a basis, the ranks also compare how many steps each
parameter has taken. For gradients that are not exchanged this is the only check.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conda_dist.layout.layout import Coordinate
from conda_dist.plan.schedule import Flags
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.collectives import Mesh
from conda_dist.runtime.errors import agree
from conda_dist.runtime.weight import Weight

PRESENT, MISSING = 0.0, 3.0
"""Values of a flag, exact in every dtype. Every other value means ``PRESENT``, too."""

ADVICE = (
    "All ranks must have gradients of the same parameters in every step: if a rank has none of a "
    "parameter, set it to zeros on that rank, or to None on all ranks."
)
LOST = "The parameters have differed between ranks since then; resume from an earlier checkpoint."
COMPARED_EVERY = 200
"""If no weight of a mesh is to be refreshed, its ranks compare in one of so many calls."""
SHOWN = 3
"""The largest number of parameters that an error names."""


class HostCopy:
    """A copy of a tensor to the host, which starts at construction. Nobody waits for it then."""

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.Event | None = None
        if values.device.type != "cpu":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            device, values = values.device, host.copy_(values, non_blocking=True)
            self._copied = torch.accelerator.current_stream(device).record_event()
        self._values = values

    def wait(self) -> Tensor:
        """Waits for the copy, and returns it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


@dataclass(slots=True)
class _Arrived:
    """Flags of one task that this rank has received, on their way to the host.

    Attributes:
        mesh: the ranks.
        dims: mesh dimensions along which this rank has the flags of all ranks.
        names: fully qualified names of the k weights.
        values: the flags, (ranks along each of ``dims``..., k).
    """

    mesh: Mesh
    dims: tuple[int, ...]
    names: tuple[str, ...]
    values: HostCopy


class GradientFlags:
    """The flags of a step. They are read at the start of the next step."""

    def __init__(self) -> None:
        self._arrived: list[_Arrived] = []

    @staticmethod
    def make(
        flags: Flags, present: Sequence[bool], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """This rank's flags for some weights of a task, (1, ..., 1, k).

        Args:
            flags: the plan, with the positions of the k weights.
            present: for each weight of the task whether this rank has a gradient of it.
            dtype: dtype in which the gradients are exchanged.
            device: device of the gradients.
        """
        shape = (*(1 for _ in flags.dims), len(flags.positions))
        made = torch.full(shape, PRESENT, dtype=dtype, device=device)
        for place, position in enumerate(flags.positions):
            if not present[position]:
                made[..., place] = MISSING
        return made

    def keep(self, mesh: Mesh, flags: Flags, names: tuple[str, ...], values: Tensor) -> None:
        """Stores received flags, and starts to copy them to the host without waiting.

        Args:
            mesh: the ranks.
            flags: the plan.
            names: names of the k weights.
            values: the flags of all ranks along ``flags.dims``, (..., k).
        """
        self._arrived.append(_Arrived(mesh, flags.dims, names, HostCopy(values)))

    def check(self) -> None:
        """Reads the flags of the last step.

        If only some ranks of the mesh got the flags, these ranks warn. The comparison of counts
        before the next refresh then raises the error on all ranks.

        Raises:
            RuntimeError: some ranks had a gradient of a parameter, and others had none. Raised on
                all ranks of the parameter's mesh.
        """
        arrived, self._arrived = self._arrived, []
        raised: list[str] = []
        warned: list[str] = []
        for flags in arrived:
            # The copy began a step ago, so it is nearly always finished.
            missing = flags.values.wait() == MISSING
            if missing.any():
                known = set(flags.mesh.shared_dims()) <= set(flags.dims)
                (raised if known else warned).extend(_describe(flags, missing))
        if raised:
            raise RuntimeError(f"{_message(raised)} {LOST}")
        if warned:
            text = f"{_message(warned)} At their next comparison this is an error, on all ranks."
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def _describe(flags: _Arrived, missing: Tensor) -> Iterable[str]:
    """A sentence for each weight of which some ranks had a gradient and others had none."""
    sizes, here = missing.shape[:-1], flags.mesh.coordinate
    rows = missing.flatten(0, -2).tolist()
    for place, name in enumerate(flags.names):
        without = [i for i, row in enumerate(rows) if row[place]]
        if 0 < len(without) < len(rows):
            lacking = [_rank(flags, sizes, here, i) for i in without]
            having = [_rank(flags, sizes, here, i) for i in range(len(rows)) if i not in without]
            yield (
                f"{name}: {_ranks(lacking)} had no gradient of it in the last step, 1 step ago, "
                f"and {_ranks(having)} had one"
            )


def _rank(flags: _Arrived, sizes: Sequence[int], here: Coordinate, place: int) -> int:
    """The global rank whose flags are at index ``place`` of the flattened ``dims``."""
    coordinate = list(here)
    for mesh_dim, size in reversed(list(zip(flags.dims, sizes, strict=True))):
        place, coordinate[mesh_dim] = divmod(place, size)
    return flags.mesh.topology.rank_at(tuple(coordinate))


def _ranks(which: Sequence[int]) -> str:
    text = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    return f"rank{'s' if len(which) > 1 else ''} {text}"


def _message(said: Sequence[str]) -> str:
    more = f" (and {len(said) - SHOWN} more)" if len(said) > SHOWN else ""
    return f"Ranks differ in which gradients they have. {'; '.join(said[:SHOWN])}{more}. {ADVICE}"


class Comparison:
    """The ranks of one mesh compare how many steps their parameters have taken.

    They compare in every call of ``step`` in which a weight may be refreshed. All ranks know these
    calls in advance, whatever gradients they have: a weight takes at most one step in a call, so if
    k steps come before its refresh, the next k calls cannot refresh it. If no weight is ever
    refreshed, as with Muon, the ranks compare in one of ``COMPARED_EVERY`` calls.

    Args:
        mesh: the ranks.
        weights: the weights of the mesh that the rule steps.
        others: the parameters of the mesh on the adamw path.
    """

    def __init__(
        self, mesh: Mesh, weights: Sequence[Weight], others: Sequence[AdamWParameter]
    ) -> None:
        self.mesh, self._weights, self._others = mesh, weights, others
        self._members: list[Weight | AdamWParameter] = [*weights, *others]
        self._groups = list({id(m.group): m.group for m in self._members}.values())
        self._gaps: list[int] = []
        self._left = 0.0  # calls of step before the next comparison
        # Weights that will be refreshed at their next gradient; no rank had one in the last step.
        self._asleep: list[Weight] = []
        self._agreed: dict[str, int] = {}  # by name, steps at the last comparison
        self._fresh = False  # whether `Setup.agree` has already compared these lines in this call
        self._compared = False  # whether the ranks have compared in this call
        self._shared = bool(mesh.shared_dims())  # whether there are other ranks

    def _counts(self) -> dict[str, int]:
        """The number of steps that each parameter has taken, by name."""
        counts = {w.name: w.step if "step" in w.state else 0 for w in self._weights}
        for parameter in self._others:
            counts[parameter.name] = (
                int(parameter.state["step"]) if "step" in parameter.state else 0
            )
        return counts

    def lines(self) -> list[str]:
        """What ranks compare: a line of four fields for each parameter.

        The fields are name, steps at the last comparison, steps now, and whether there is a
        gradient.
        """
        counts = self._counts()
        self._agreed = self._agreed or counts
        return [
            f"{m.name}\t{self._agreed.get(m.name, 0)}\t{counts[m.name]}\t{m.param.grad is not None}"
            for m in self._members
        ]

    def record_agreement(self) -> None:
        """Records that the ranks have compared their lines in this call and found them equal."""
        self._agreed = self._counts()
        self._fresh = self._compared = True

    def compare(self) -> None:
        """Compares the ranks' lines, if this is a call in which they do.

        Raises:
            RuntimeError: the lines differ. Raised on all ranks, before anything is changed.
        """
        fresh, self._fresh = self._fresh, False
        if fresh or not self._shared:
            return
        self._left -= 1
        due = self._left < 0
        for weight in self._asleep:
            due = due or weight.param.grad is not None
        for group, gap in zip(self._groups, self._gaps, strict=False):
            due = due or int(group.get("update_proj_gap", 0)) != gap
        if not due:
            return
        agree(self.mesh, self.lines(), None, explain=explain)
        self.record_agreement()
        self._fresh = False

    def schedule_next(self) -> None:
        """Finds the call of the next comparison, after a step in which the ranks have compared."""
        if not self._compared or not self._shared:
            return
        self._compared = False
        self._gaps = [int(group.get("update_proj_gap", 0)) for group in self._groups]
        waits = [(weight, weight.steps_to_refresh()) for weight in self._weights]
        self._asleep = [w for w, wait in waits if not wait and w.param.grad is None]
        asleep = set(map(id, self._asleep))
        self._left = min((wait for w, wait in waits if id(w) not in asleep), default=math.inf)
        if math.isinf(self._left):
            self._left = COMPARED_EVERY - 1


def explain(texts: Mapping[int, str]) -> str:
    """The message for lines that differ, see :meth:`Comparison.lines`.

    Args:
        texts: the joined lines of each global rank.
    """
    said, lost = [], False
    tables = [[line.split("\t") for line in text.split("\n")] for text in texts.values()]
    for row in zip(*tables, strict=True):
        name, agreed, *_ = row[0]
        by_steps, by_gradient = defaultdict(list), defaultdict(list)
        for rank, (_, _, steps, present) in zip(texts, row, strict=True):
            by_steps[int(steps) - int(agreed)].append(rank)
            by_gradient[present].append(rank)
        if len(by_steps) > 1:
            lost = True
            taken = " and ".join(f"{_ranks(by_steps[n])} took {n}" for n in sorted(by_steps))
            said.append(
                f"{name}: of the {max(by_steps)} steps since step {agreed}, when the ranks last "
                f"compared, {taken}"
            )
        elif len(by_gradient) > 1:
            said.append(
                f"{name}: in this step, the first one that differs, {_ranks(by_gradient['False'])} "
                f"had no gradient of it, and {_ranks(by_gradient['True'])} had one"
            )
    return _message(said) + f" {LOST}" * lost
