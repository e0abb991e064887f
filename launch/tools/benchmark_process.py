"""Steps of optimizers in one process: what `benchmark` measures, tabulates and draws."""

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from conda_dist import NAMO, NAMO_D, Conda, Muon, NorMuon
from conda_dist.launch.job.picture import new_figure

NEVER = 10**9  # steps between refreshes: none but the first
STALL_GAP = 8  # the same, where the time is measured that they add

Step = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is measured of a step besides its time."""

    state: int
    """Bytes of the optimizer's state."""
    stall_s: float | None
    """Seconds that a refresh adds to the steps around it; None: there are no refreshes."""


def shapes(width: int, mlp: int, layers: int) -> list[tuple[int, int]]:
    """The projections of LLaMA blocks, (m, n): q, k, v, o; gate, up; down."""
    return [*[(width, width)] * 4, *[(mlp, width)] * 2, (width, mlp)] * layers


def parameters(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Random parameters of these shapes, with gradients, on torch's default device."""
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(size)).to(dtype)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def two_products(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Makes a step that only projects the gradients and projects them back: the floor."""
    grads = [torch.randn(size, dtype=dtype) for size in sizes]
    bases = [torch.randn(min(s), min(s), dtype=dtype) / min(s) for s in sizes]

    def step() -> None:
        for grad, basis in zip(grads, bases, strict=True):
            if grad.shape[0] >= grad.shape[1]:
                (grad @ basis) @ basis.mT
            else:
                basis @ (basis.mT @ grad)

    return step


def newton_schulz_products(sizes: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """A step that only multiplies what five iterations multiply: the floor of Muon and its kin."""
    wide = [torch.randn(min(s), max(s), dtype=torch.bfloat16) / max(s) for s in sizes]

    def step() -> None:
        for x in wide:
            for _ in range(5):
                gram = x @ x.mT
                (gram @ gram) @ x

    return step


def _now() -> float:
    """The time, once the GPU, if there is one, has done all that was enqueued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def builders(
    sizes: Sequence[tuple[int, int]], gap: int = NEVER, method: str = "svd"
) -> dict[str, Callable[[], Step]]:
    """For each optimizer, by name, what makes its step, with parameters of its own.

    Args:
        sizes: shapes of the matrices.
        gap: steps between refreshes of the bases.
        method: Conda's ``refresh_method``.
    """

    def conda(**options: Any) -> Callable[[], Step]:
        def build() -> Step:
            group = {"params": parameters(sizes), "algorithm": "conda"}
            return Conda([group], update_proj_gap=gap, refresh_method=method, **options).step

        return build

    rules: list[Callable[..., Optimizer]] = [Muon, NorMuon, NAMO, NAMO_D]

    def steps(rule: Callable[..., Optimizer], name: str) -> Callable[[], Step]:
        return lambda: rule([{"params": parameters(sizes), "algorithm": name}]).step

    half = {"matmul_dtype": torch.bfloat16}
    ours = {
        "conda_dist": conda(),
        "conda_dist, bfloat16": conda(**half),
        "conda_dist, diagnostics": conda(diagnostics_every=1),
        "conda_dist, async": conda(refresh_delay=max(1, min(gap // 2, 20))),
    }
    others: dict[str, Callable[[], Step]] = {
        "two products": lambda: two_products(sizes),
        "torch.optim.AdamW": lambda: torch.optim.AdamW(parameters(sizes), fused=True).step,
        "Newton-Schulz products": lambda: newton_schulz_products(sizes),
        "torch.optim.Muon": lambda: torch.optim.Muon(parameters(sizes)).step,
        **{rule.__name__: steps(rule, rule.__name__.lower()) for rule in rules},
    }
    try:
        from pytorch_optimizer import SOAP
        from pytorch_optimizer import Conda as Other
    except ModuleNotFoundError:
        print("pip install pytorch_optimizer to compare with its Conda and SOAP")
        return {**ours, **others}
    group = {"update_proj_gap": gap, "scale": 0.25}
    return {
        "pytorch_optimizer.Conda": lambda: Other([{"params": parameters(sizes), **group}]).step,
        **ours,
        **others,
        "pytorch_optimizer.SOAP": lambda: SOAP(parameters(sizes), precondition_frequency=gap).step,
    }


def contenders(
    sizes: Sequence[tuple[int, int]],
    gap: int = NEVER,
    method: str = "svd",
    only: Collection[str] = (),
    device: str = "cpu",
) -> dict[str, Step]:
    """A step of each optimizer, which has begun; see `builders`. ``only``: names; (): all."""
    made = builders(sizes, gap, method)
    if gap == NEVER:
        del made["conda_dist, async"]  # the same as in sync
    with torch.device(device):
        steps = {name: build() for name, build in made.items() if not only or name in only}
    for step in steps.values():
        for _ in range(2):  # the first takes the bases
            step()
    return steps


def facts(
    steps: dict[str, Step], sizes: Sequence[tuple[int, int]], method: str, device: str = "cpu"
) -> dict[str, Facts]:
    """What each step holds, and what refreshes add to it, whatever the gap of ``steps``.

    Args:
        steps: those of `contenders`, timed already.
        sizes: shapes of the matrices.
        method: Conda's ``refresh_method``.
        device: where the parameters are.
    """
    made = builders(sizes, STALL_GAP, method)
    refreshed = [name for name in steps if "onda" in name or "SOAP" in name]
    if len(steps) >= len(made) - 1:  # all that there are
        refreshed = [name for name in made if "onda" in name or "SOAP" in name]
    stalls = {}
    for name in refreshed:
        with torch.device(device):
            begun = made[name]()
        stalls[name] = stall(begun)
    found = {}
    for name, step in steps.items():
        owner = getattr(step, "__self__", None)
        state = _state_bytes(owner) if isinstance(owner, Optimizer) else 0
        found[name] = Facts(state, stalls.get(name))
    if "conda_dist, async" in stalls and "conda_dist, async" not in found:
        found["conda_dist, async"] = Facts(0, stalls["conda_dist, async"])
    return found


def _state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def stall(step: Step, refreshes: int = 2) -> float:
    """Seconds that a refresh every STALL_GAP steps adds to the steps around it."""
    for _ in range(STALL_GAP):  # the first takes the bases
        step()
    taken = []
    for _ in range(refreshes * STALL_GAP):
        start = _now()
        step()
        taken.append(_now() - start)
    return (sum(taken) - len(taken) * statistics.median(taken)) / refreshes


def measure(
    steps: dict[str, Callable[[], Any]], rounds: int, each: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step in every round, in turns; the mean of ``each`` in a row."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        names = list(steps) if i % 2 else list(steps)[::-1]
        for name in names:
            start = _now()
            for _ in range(each):
                steps[name]()
            taken[name].append((_now() - start) / each)
    return taken


def _table(taken: dict[str, list[float]], found: dict[str, Facts], title: str) -> Table:
    first = next(iter(taken))
    table = Table(title=title)
    for heading in (
        "step of", "median ms", "quartiles ms", "times the first",
        "state MiB", "a refresh ms",
    ):  # fmt: skip
        justify: Literal["left", "right"] = "left" if heading == "step of" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, about in found.items():
        times = ["", "", ""]
        if seconds := taken.get(name):
            low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
            ratio = statistics.median(a / b for a, b in zip(seconds, taken[first], strict=True))
            times = [f"{median:.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.3f}"]
        state = f"{about.state / 2**20:.1f}" if about.state else ""
        stalled = "" if about.stall_s is None else f"{1e3 * about.stall_s:.1f}"
        table.add_row(name, *times, state, stalled)
    return table


def draw(taken: dict[str, list[float]], title: str, file: Path) -> None:
    """Draws medians as bars, and the quartiles around them.

    Args:
        taken: seconds of every round, by name.
        title: of the picture.
        file: where to; its ending says in which format.
    """
    figure, (axis,) = new_figure(1)
    for place, (name, seconds) in enumerate(reversed(taken.items())):
        low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
        colour = "#1f5a94" if name.startswith("conda_dist") else "#a9c1d9"
        axis.barh(name, median, color=colour, xerr=[[median - low], [high - median]])
        axis.text(high, place, f" {median:.3g}", va="center")
    axis.set(xlabel="ms a step", title=title)
    axis.margins(x=0.1)
    figure.savefig(file, dpi=150)


def run(given: argparse.Namespace) -> None:
    """Does what the command line says, and prints the table."""
    torch.set_num_threads(1)
    sizes = shapes(given.width, given.mlp, given.layers)
    rounds = max(given.rounds, 2)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    device = given.device
    steps = contenders(sizes, given.gap or NEVER, given.refresh_method, given.only, device)
    taken = measure(steps, rounds, given.gap or 1)
    where = "one thread" if device == "cpu" else device
    title = f"{len(sizes)} matrices, width {given.width}, MLP {given.mlp}, {where}"
    if given.gap:
        title += f", one step in {given.gap} with a refresh ({given.refresh_method})"
    console.print(_table(taken, facts(steps, sizes, given.refresh_method, device), title))
    if given.picture:
        draw(taken, title, given.picture)
