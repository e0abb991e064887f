"""Whether all ranks have gradients of the same parameters: flags beside gradients, compared counts.

Exchanges are planned for all trainable weights. A missing gradient travels as zeros with a flag,
which all receivers read at the start of the next step, so that no rank waits for it. A step without
an exchange has no flags: there the ranks compare their counts of steps before every refresh.
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
from conda_dist.runtime.collectives import Mesh, agree
from conda_dist.runtime.weight import Weight

PRESENT, MISSING = 0.0, 3.0
"""Values of a flag, exact in every dtype. Any other value counts as ``PRESENT``."""

ADVICE = (
    "Every rank must have a gradient of the same parameters in every step: where one has none, "
    "give it zeros, or set it to None on all ranks."
)
LOST = "The parameters have differed since; resume from a checkpoint of before."
SHOWN = 3
"""Parameters that an error names, at most."""


@dataclass(slots=True)
class _Arrived:
    """Flags of one task, on their way to the host.

    Attributes:
        mesh: the ranks.
        dims: mesh dimensions along which this rank knows all flags.
        names: of the weights.
        values: flags by index along each of ``dims`` and by weight.
        copied: when they have arrived on the host; None on CPUs.
    """

    mesh: Mesh
    dims: tuple[int, ...]
    names: tuple[str, ...]
    values: Tensor
    copied: torch.Event | None


class GradientFlags:
    """The flags of a step, which are read at the start of the next one."""

    def __init__(self) -> None:
        self._arrived: list[_Arrived] = []

    @staticmethod
    def make(
        flags: Flags, present: Sequence[bool], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """This rank's flags of some weights of a task, (1, ..., 1, k).

        Args:
            flags: which weights.
            present: for each weight of the task whether this rank has a gradient of it.
            dtype: what their gradients travel in.
            device: where their gradients are.
        """
        shape = (*(1 for _ in flags.dims), len(flags.positions))
        made = torch.full(shape, PRESENT, dtype=dtype, device=device)
        for place, position in enumerate(flags.positions):
            if not present[position]:
                made[..., place] = MISSING
        return made

    def keep(self, mesh: Mesh, flags: Flags, names: tuple[str, ...], values: Tensor) -> None:
        """Takes the flags that arrived, and copies them to the host without waiting for that."""
        copied = None
        if values.device.type != "cpu":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            device, values = values.device, host.copy_(values, non_blocking=True)
            copied = torch.accelerator.current_stream(device).record_event()
        self._arrived.append(_Arrived(mesh, flags.dims, names, values, copied))

    def check(self) -> None:
        """Reads the flags of the last step.

        Where they tell some ranks of a mesh only, these warn: the comparison of counts before the
        next refresh raises, on all ranks.

        Raises:
            RuntimeError: some ranks had a gradient of a parameter, and others had none; on all
                ranks of its mesh.
        """
        arrived, self._arrived = self._arrived, []
        raised: list[str] = []
        warned: list[str] = []
        for flags in arrived:
            if flags.copied is not None:
                flags.copied.synchronize()  # a step ago: it has nearly always happened
            missing = flags.values == MISSING
            if missing.any():
                known = set(flags.mesh.shared_dims()) <= set(flags.dims)
                (raised if known else warned).extend(_describe(flags, missing))
        if raised:
            raise RuntimeError(f"{_message(raised)} {LOST}")
        if warned:
            text = f"{_message(warned)} At the next refresh this is an error, on all ranks."
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def _describe(flags: _Arrived, missing: Tensor) -> Iterable[str]:
    """What is wrong with each weight that some ranks have a gradient of, and others have not."""
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
    """The global rank whose flags are at a place."""
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
    """When the ranks of one mesh compare how many steps their parameters have taken.

    They do before every step in which a weight may be refreshed, and so in the same steps whatever
    gradients they have: a weight is refreshed after a number of steps of its own, of which it takes
    one at each call, or fewer if it has no gradient.

    Args:
        mesh: the ranks.
        weights: the weights of the mesh, on the conda path.
        others: its parameters on the adamw path.
    """

    def __init__(
        self, mesh: Mesh, weights: Sequence[Weight], others: Sequence[AdamWParameter]
    ) -> None:
        self.mesh, self._weights, self._others = mesh, weights, others
        self._members: list[Weight | AdamWParameter] = [*weights, *others]
        self._groups = list({id(m.group): m.group for m in self._members}.values())
        self._gaps: list[int] = []
        self._left = 0.0  # calls before the next comparison
        self._asleep: list[Weight] = []  # due at their next gradient, which no rank had
        self._agreed: dict[str, int] = {}  # steps by name when the ranks last compared them
        self._fresh = self._compared = False
        self._shared = bool(mesh.shared_dims())

    def _counts(self) -> dict[str, int]:
        counts = {w.name: w.step if "step" in w.state else 0 for w in self._weights}
        for parameter in self._others:
            counts[parameter.name] = (
                int(parameter.state["step"]) if "step" in parameter.state else 0
            )
        return counts

    def lines(self) -> list[str]:
        """What to compare: by parameter its steps, those at the last comparison, any gradient."""
        counts = self._counts()
        self._agreed = self._agreed or counts
        return [
            f"{m.name}\t{self._agreed.get(m.name, 0)}\t{counts[m.name]}\t{m.param.grad is not None}"
            for m in self._members
        ]

    def compared(self) -> None:
        """Takes note that ranks have compared their lines for this call, and found them equal."""
        self._agreed = self._counts()
        self._fresh = self._compared = True

    def compare(self) -> None:
        """Compares, in a call in which a weight may be refreshed.

        Raises:
            RuntimeError: ranks differ; on all alike, and before anything was changed.
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
        self.compared()
        self._fresh = False

    def settle(self) -> None:
        """After a step: finds the next one for which to compare, if this one did."""
        if not self._compared or not self._shared:
            return
        self._compared = False
        self._gaps = [int(group.get("update_proj_gap", 0)) for group in self._groups]
        waits = [(weight, weight.steps_to_refresh()) for weight in self._weights]
        self._asleep = [w for w, wait in waits if not wait and w.param.grad is None]
        asleep = set(map(id, self._asleep))
        self._left = min((wait for w, wait in waits if id(w) not in asleep), default=math.inf)


def explain(texts: Mapping[int, str]) -> str:
    """Says how the lines of ranks differ, see :meth:`Comparison.lines`."""
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
