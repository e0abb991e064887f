"""Steps of optimizers in one process: what `benchmark` measures, tabulates and draws."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from conda_dist import NAMO, NAMO_D, Conda, Muon, NorMuon
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.picture import new_figure
from conda_dist.numerics.precision import matmul_precision

NEVER = 10**9  # steps between refreshes: there are none
HALF = torch.bfloat16

Step = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """What makes a step, with parameters of its own; and whether some of its steps refresh."""

    make: Callable[[], Step]
    refreshes: bool = False


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step, or the means of some in a row."""

    device: float
    """Until the device has done it; this includes what it waits for the host to launch."""
    host: float
    """Until the call has returned; on a CPU the same."""
    refresh: float = 0.0
    """What one refresh has added to the steps in a row."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is measured of a contender."""

    rounds: list[Times]
    state: int
    """Bytes of the optimizer's state."""
    temporary: int | None
    """Bytes of a GPU that a step takes besides parameters, gradients and state, at its peak."""
    refreshes: bool


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
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32, tf32: bool = False
) -> Step:
    """Makes a step that only projects the gradients and projects them back: the floor."""
    grads = [torch.randn(size, dtype=dtype) for size in sizes]
    bases = [torch.randn(min(s), min(s), dtype=dtype) / min(s) for s in sizes]

    def step() -> None:
        with matmul_precision("tf32" if tf32 else "ieee"):
            for grad, basis in zip(grads, bases, strict=True):
                if grad.shape[0] >= grad.shape[1]:
                    (grad @ basis) @ basis.mT
                else:
                    basis @ (basis.mT @ grad)

    return step


def newton_schulz_products(sizes: Sequence[tuple[int, int]]) -> Step:
    """A step that only multiplies what five iterations multiply: the floor of Muon and its kin."""
    wide = [torch.randn(min(s), max(s), dtype=HALF) / max(s) for s in sizes]

    def step() -> None:
        for x in wide:
            for _ in range(5):
                gram = x @ x.mT
                (gram @ gram) @ x

    return step


def _random_bases(params: Sequence[Tensor]) -> list[Tensor]:
    """An orthogonal matrix for each, which costs as much in a step as one from a decomposition."""
    ranks = [min(param.shape) for param in params]
    found = {r: torch.linalg.qr(torch.randn(r, r)).Q for r in set(ranks)}
    return [found[r].clone() for r in ranks]


def conda_step(
    sizes: Sequence[tuple[int, int]],
    gap: int = NEVER,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Step:
    """A step of Conda; without refreshes its bases are random, and no first step is slow."""
    params = parameters(sizes, dtype)
    group = {"params": params, "algorithm": "conda"}
    optimizer = Conda([group], update_proj_gap=gap, **options)
    if gap == NEVER:
        optimizer.init_state()
        for param, basis in zip(params, _random_bases(params), strict=True):
            state = optimizer.state[param]
            for name in {"basis", "left_basis", "right_basis"} & state.keys():
                state[name].copy_(basis)
            state["basis_step"].fill_(0)
            state["step"].fill_(1)
        optimizer._setup = None  # its meshes have started
    return optimizer.step


def _other_step(sizes: Sequence[tuple[int, int]], gap: int) -> Step:
    """A step of pytorch_optimizer's Conda, in the same way."""
    from pytorch_optimizer import Conda as Other
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    params = parameters(sizes)
    optimizer = Other([{"params": params, "update_proj_gap": gap, "scale": 0.25}])
    if gap == NEVER:
        optimizer.init_group(optimizer.param_groups[0])
        for param, basis in zip(params, _random_bases(params), strict=True):
            projector = GaLoreProjector(None, gap, 0.25)
            projector.ortho_matrix = basis
            optimizer.state[param]["projector"] = projector
    return optimizer.step


def contenders(
    sizes: Sequence[tuple[int, int]], gap: int, method: str, device: str
) -> dict[str, Contender]:
    """All contenders, by name.

    Args:
        sizes: shapes of the matrices.
        gap: steps between refreshes of the bases; NEVER for none.
        method: Conda's ``refresh_method``.
        device: where they will run: "cpu" or "cuda".
    """

    def conda(**options: Any) -> Contender:
        return Contender(lambda: conda_step(sizes, gap, refresh_method=method, **options), True)

    rules: list[Callable[..., Optimizer]] = [Muon, NorMuon, NAMO, NAMO_D]

    def steps(rule: Callable[..., Optimizer], name: str) -> Contender:
        return Contender(lambda: rule([{"params": parameters(sizes), "algorithm": name}]).step)

    found = {
        "pytorch_optimizer.Conda": Contender(lambda: _other_step(sizes, gap), True),
        "conda_dist": conda(),
        "conda_dist, TF32": conda(matmul_dtype="tf32"),
        "conda_dist, bfloat16": conda(matmul_dtype=HALF),
        "conda_dist, diagnostics": conda(diagnostics_every=1),
        "conda_dist, bases from gradients": conda(basis_source="gradients"),
        "conda_dist, async": conda(refresh_delay=max(1, min(gap // 2, 20))),
        "two products": Contender(lambda: two_products(sizes)),
        "two products, TF32": Contender(lambda: two_products(sizes, tf32=True)),
        "two products, bfloat16": Contender(lambda: two_products(sizes, HALF)),
        "torch.optim.AdamW": Contender(
            lambda: torch.optim.AdamW(parameters(sizes), fused=True).step
        ),
        "Newton-Schulz products": Contender(lambda: newton_schulz_products(sizes)),
        "torch.optim.Muon": Contender(lambda: torch.optim.Muon(parameters(sizes)).step),
        **{rule.__name__: steps(rule, rule.__name__.lower()) for rule in rules},
    }
    if gap == NEVER:
        del found["conda_dist, async"]  # the same as in sync
    if device == "cpu":  # which does not round to TF32
        found = {name: contender for name, contender in found.items() if "TF32" not in name}
    try:
        from pytorch_optimizer import SOAP
    except ModuleNotFoundError:
        print("pip install pytorch_optimizer to compare with its Conda and SOAP")
        del found["pytorch_optimizer.Conda"]
        return found
    found["pytorch_optimizer.SOAP"] = Contender(
        lambda: SOAP(parameters(sizes), precondition_frequency=gap).step, True
    )
    return found


def begin(made: Mapping[str, Contender], device: str) -> dict[str, Step]:
    """Makes steps, and takes two of each: the first allocates, and may take the bases."""
    with torch.device(device):
        steps = {name: contender.make() for name, contender in made.items()}
    for step in steps.values():
        step()
        step()
    return steps


def time_once(call: Step, device: torch.device) -> Times:
    """Times a call: by the host's clock on a CPU, and by events of the stream on a GPU."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        taken = time.perf_counter() - began
        return Times(taken, taken)
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    # Not the whole device: a refresh in the background has a stream of its own.
    torch.cuda.current_stream(device).synchronize()
    began = time.perf_counter()
    first.record()
    call()
    host = time.perf_counter() - began
    last.record()
    last.synchronize()
    return Times(first.elapsed_time(last) / 1000, host)


def measure(
    steps: Mapping[str, Step], rounds: int, each: int = 1, device: str = "cpu"
) -> dict[str, list[Times]]:
    """Times ``each`` steps in a row in every round, one of which may refresh; in turns."""
    found: dict[str, list[Times]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 else list(steps)[::-1]:
            taken = [time_once(steps[name], torch.device(device)) for _ in range(each)]
            device_s, host_s = [t.device for t in taken], [t.host for t in taken]
            refresh = sum(device_s) - each * statistics.median_low(device_s)
            found[name].append(Times(sum(device_s) / each, sum(host_s) / each, refresh))
    return found


def temporary_bytes(step: Step, device: str, each: int = 1) -> int | None:
    """Bytes of a GPU that steps which have begun take at their peak and give back; else None."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(each):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def state_bytes(step: Step) -> int:
    """Bytes of the tensors in the state of the optimizer whose step it is; 0 if it has none."""
    states = getattr(getattr(step, "__self__", None), "state", {})
    leaves = [getattr(leaf, "ortho_matrix", leaf) for leaf in tree_leaves([*states.values()])]
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def compare(
    made: Mapping[str, Contender], rounds: int, each: int = 1, device: str = "cpu"
) -> dict[str, Found]:
    """Measures contenders; see `measure`.

    On a CPU all take turns, so that whatever slows the machine down slows all. A GPU is not shared,
    and its memory may hold one of them only: there they run one after another.
    """
    found: dict[str, Found] = {}
    for names in [[*made]] if device == "cpu" else [[name] for name in made]:
        steps = begin({name: made[name] for name in names}, device)
        taken = measure(steps, rounds, each, device)
        for name in names:
            step = steps.pop(name)
            peak = temporary_bytes(step, device, each)
            found[name] = Found(taken[name], state_bytes(step), peak, made[name].refreshes)
            del step
        if device != "cpu":
            torch.cuda.empty_cache()
    return found


def numbers(found: Found, first: Found, weights: int, gap: int | None) -> dict[str, Any]:
    """What is said of a contender; ``first`` is what its time is divided by.

    Times are medians of the rounds, with quartiles. What was not measured is None.
    """
    low, median, high = statistics.quantiles([1e3 * t.device for t in found.rounds], n=4)
    pairs = zip(found.rounds, first.rounds, strict=True)
    on_gpu, refreshes = found.temporary is not None, found.refreshes and gap is not None
    host_us = 1e6 * statistics.median(t.host for t in found.rounds) / weights
    refresh_ms = 1e3 * statistics.median(t.refresh for t in found.rounds)
    return {
        "median_ms": median,
        "quartiles_ms": (low, high),
        "times_the_first": statistics.median(a.device / b.device for a, b in pairs),
        "host_us_a_weight": host_us if on_gpu else None,
        "state_bytes": found.state,
        "temporary_bytes": found.temporary,
        "refresh_ms": refresh_ms if refreshes else None,
    }


def _table(said: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("step of", no_wrap=True)
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "median ms": ("median_ms", lambda ms: f"{ms:.2f}"),
        "quartiles ms": ("quartiles_ms", lambda ms: f"{ms[0]:.2f} - {ms[1]:.2f}"),
        "times the first": ("times_the_first", lambda ratio: f"{ratio:.3f}"),
        "host us a weight": ("host_us_a_weight", lambda us: f"{us:.1f}"),
        "state MiB": ("state_bytes", lambda held: f"{held / 2**20:.1f}" if held else ""),
        "temporary MiB": ("temporary_bytes", lambda held: f"{held / 2**20:.1f}"),
        "a refresh ms": ("refresh_ms", lambda ms: f"{ms:.1f}"),
    }
    kept = [c for c in columns.items() if any(row[c[1][0]] is not None for row in said.values())]
    for heading, _ in kept:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in said.items():
        cells = ["" if row[key] is None else show(row[key]) for _, (key, show) in kept]
        table.add_row(name, *cells)
    return table


def draw(said: Mapping[str, Mapping[str, Any]], title: str, file: Path) -> None:
    """Draws medians as bars, and the quartiles around them.

    Args:
        said: the `numbers`, by name.
        title: of the picture.
        file: where to; its ending says in which format.
    """
    figure, (axis,) = new_figure(1)
    for place, (name, row) in enumerate(reversed([*said.items()])):
        median, (low, high) = row["median_ms"], row["quartiles_ms"]
        colour = "#1f5a94" if name.startswith("conda_dist") else "#a9c1d9"
        axis.barh(name, median, color=colour, xerr=[[median - low], [high - median]])
        axis.text(high, place, f" {median:.3g}", va="center")
    axis.set(xlabel="ms a step", title=title)
    axis.margins(x=0.1)
    figure.savefig(file, dpi=150)


def run(given: argparse.Namespace) -> None:
    """Does what the command line says, and prints the table.

    Raises:
        ConfigError: A contender is asked for that there is not.
    """
    torch.set_num_threads(1)
    sizes, gap, device = shapes(given.width, given.mlp, given.layers), given.gap, given.device
    made = contenders(sizes, gap or NEVER, given.refresh_method, device)
    if unknown := [name for name in given.only if name not in made]:
        raise ConfigError(f"--only {unknown[0]!r}: there are {', '.join(map(repr, made))}")
    made = {name: made[name] for name in made if not given.only or name in given.only}
    found = compare(made, max(given.rounds, 2), gap or 1, device)
    first = next(iter(found.values()))
    said = {name: numbers(each, first, len(sizes), gap) for name, each in found.items()}
    where = "one thread" if device == "cpu" else torch.cuda.get_device_name()
    title = f"{len(sizes)} matrices, width {given.width}, MLP {given.mlp}, {where}"
    if gap:
        title += f", one step in {gap} with a refresh ({given.refresh_method})"
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(_table(said, title))
    if given.picture:
        draw(said, title, given.picture)
    if given.json:
        facts = {"device": platform.machine() if device == "cpu" else where}
        facts |= {"torch": torch.__version__, "title": title, "rounds": given.rounds}
        given.json.write_text(json.dumps({**facts, "steps": said}, indent=1) + "\n")
