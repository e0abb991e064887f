"""Layer: launch. Time of an optimizer's step on LLaMA-shaped matrices, one process, one thread.

    python -m conda_dist.launch.benchmark [--width 512] [--mlp 1376] [--layers 4] [--rounds 40]
    python -m conda_dist.launch.benchmark --gap 5 [--refresh-method orthogonal_iteration]
    python -m conda_dist.launch.benchmark --ranks 4 ...

All run in turns within one process, so that whatever slows the machine down slows all; medians
and quartiles of the rounds are printed, and the medians of their ratios to the first. Steps are
those between refreshes, or with `--gap` the mean of so many, one of which refreshes the bases
(SOAP's and the other Conda's, too). "two products" is the floor: the projection and the way back
alone. `--ranks` instead compares the CPU time of a step on as many processes with one process's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from conda_dist import Conda
from conda_dist.launch import benchmark_ranks
from conda_dist.launch.options import positive
from conda_dist.options import REFRESH_METHODS

NEVER = 10**9  # steps between refreshes: none but the first


def shapes(width: int, mlp: int, layers: int) -> list[tuple[int, int]]:
    """The projections of LLaMA blocks, (m, n): q, k, v, o; gate, up; down."""
    return [*[(width, width)] * 4, *[(mlp, width)] * 2, (width, mlp)] * layers


def _parameters(sizes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size) * 0.02) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _two_products(sizes: Sequence[tuple[int, int]]) -> Callable[[], None]:
    grads = [torch.randn(size) for size in sizes]
    bases = [torch.linalg.qr(torch.randn(min(s), min(s)))[0] for s in sizes]

    def step() -> None:
        for grad, basis in zip(grads, bases, strict=True):
            if grad.shape[0] >= grad.shape[1]:
                (grad @ basis) @ basis.mT
            else:
                basis @ (basis.mT @ grad)

    return step


def contenders(
    sizes: Sequence[tuple[int, int]], gap: int = NEVER, method: str = "svd"
) -> dict[str, Callable[[], Any]]:
    """A step of each optimizer, by name; each has parameters of its own and has begun.

    Args:
        sizes: shapes of the matrices.
        gap: steps between refreshes of the bases.
        method: Conda's ``refresh_method``.
    """

    def conda(**options: Any) -> Callable[[], Any]:
        group = {"params": _parameters(sizes), "algorithm": "conda"}
        return Conda([group], update_proj_gap=gap, refresh_method=method, **options).step

    steps: dict[str, Callable[[], Any]] = {
        "conda_dist": conda(),
        "conda_dist, compiled": conda(compile=True),
        "conda_dist, bfloat16": conda(matmul_dtype=torch.bfloat16),
        "conda_dist, bfloat16, compiled": conda(matmul_dtype=torch.bfloat16, compile=True),
        "two products": _two_products(sizes),
        "torch.optim.AdamW": torch.optim.AdamW(_parameters(sizes), foreach=True).step,
    }
    muon = torch.optim.Muon(_parameters(sizes))
    steps["torch.optim.Muon"] = muon.step
    try:
        from pytorch_optimizer import SOAP
        from pytorch_optimizer import Conda as Other
    except ModuleNotFoundError:
        print("pip install pytorch_optimizer to compare with its Conda and SOAP")
    else:
        group = {"params": _parameters(sizes), "update_proj_gap": gap, "scale": 0.25}
        steps = {"pytorch_optimizer.Conda": Other([group]).step, **steps}
        soap = SOAP(_parameters(sizes), precondition_frequency=gap)
        steps["pytorch_optimizer.SOAP"] = soap.step
    for step in steps.values():
        for _ in range(2):  # the first takes the bases
            step()
    return steps


def measure(
    steps: dict[str, Callable[[], Any]], rounds: int, each: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step in every round, in turns; the mean of ``each`` in a row."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        names = list(steps) if i % 2 else list(steps)[::-1]
        for name in names:
            start = time.perf_counter()
            for _ in range(each):
                steps[name]()
            taken[name].append((time.perf_counter() - start) / each)
    return taken


def _table(taken: dict[str, list[float]], title: str) -> Table:
    first = next(iter(taken))
    table = Table(title=title)
    for heading in ("step of", "median ms", "quartiles ms", "times the first"):
        justify: Literal["left", "right"] = "left" if heading == "step of" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, seconds in taken.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
        ratio = statistics.median(a / b for a, b in zip(seconds, taken[first], strict=True))
        table.add_row(name, f"{median:.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(
        prog="python -m conda_dist.launch.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, default in (("width", 512), ("mlp", 1376), ("layers", 4), ("rounds", 40)):
        parser.add_argument(f"--{option}", type=positive, default=default)
    parser.add_argument("--gap", type=positive)
    parser.add_argument("--refresh-method", choices=REFRESH_METHODS, default=REFRESH_METHODS[1])
    parser.add_argument("--ranks", type=positive, default=1)
    given = parser.parse_args(arguments)
    if given.ranks > 1 and given.gap:
        parser.error("--gap is for one process: with --ranks, steps are those between refreshes")
    torch.set_num_threads(1)
    sizes = shapes(given.width, given.mlp, given.layers)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    if given.ranks > 1:
        console.print(benchmark_ranks.measure(sizes, given.ranks, max(given.rounds, 2)))
        return
    steps = contenders(sizes, given.gap or NEVER, given.refresh_method)
    taken = measure(steps, max(given.rounds, 2), given.gap or 1)
    title = f"{len(sizes)} matrices, width {given.width}, MLP {given.mlp}, one thread"
    if given.gap:
        title += f", one step in {given.gap} with a refresh ({given.refresh_method})"
    console.print(_table(taken, title))


if __name__ == "__main__":
    main()
