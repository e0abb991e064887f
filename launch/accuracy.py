"""Layer: launch. How near each refresh method comes to the singular vectors of real momenta.

    python -m conda_dist.launch.accuracy runs/llama_tiny [--checkpoint DIR]

Loads a run's newest checkpoint (or that one) in one process, takes a refresh of every matrix by
every method from the basis in use, and tabulates it beside that basis and the SVD in float64:

- residual: what a basis B leaves off the diagonal of B^T M^T M B, which singular vectors make
  diagonal, relative to all of it (Frobenius norms);
- leading quarter: how much of |M|^2 the first quarter of its columns hold, relative to what the
  largest singular values hold;
- orthonormality: the largest element of B^T B - I.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from conda_dist import Conda
from conda_dist.decomposition import Outcome, decompose, orthonormal
from conda_dist.launch.cluster import process_group
from conda_dist.launch.cluster.process_group import JobError
from conda_dist.launch.data.preparation import open_data
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import Checkpoints
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.engine import Fsdp2Engine
from conda_dist.launch.pretrain import CHECKPOINTS, EXIT_CONFIG, RESOLVED_CONFIG
from conda_dist.maths import matrices, project
from conda_dist.options import REFRESH_METHODS
from conda_dist.storage import local

BEFORE, EXACT = "the basis in use", "SVD in float64"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What one basis is of one momentum; see the head of the file."""

    residual: float
    quarter: float
    orthonormality: float
    milliseconds: float = 0.0
    """What the decomposition took."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conda_dist.launch.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="output folder of a run with Conda on FSDP2")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one of its checkpoints")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # for times that compare
    try:
        momenta, step = load(given.run, given.checkpoint)
    except (ConfigError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    finally:
        process_group.leave()
    found: dict[str, list[Accuracy]] = {}
    for momentum, basis, right in momenta:
        for name, accuracy in measure(momentum, basis, right).items():
            found.setdefault(name, []).append(accuracy)
    console = Console()
    title = f"{given.run}, step {step}: {len(momenta)} matrices, median (worst)"
    (console if console.is_terminal else Console(width=120)).print(tabulate(found, title))
    return 0


def load(run: Path, checkpoint: Path | None) -> tuple[list[tuple[Tensor, Tensor, bool]], int]:
    """Loads what a run's checkpoint has of momenta.

    Returns:
        Of every matrix that has taken a basis the first moment (m, n) in the coordinates of that
        basis, the basis (r, r), and whether m >= n; and the checkpoint's step.

    Raises:
        ConfigError: The folder is not of such a run.
        JobError: The checkpoint cannot be used.
    """
    config = options.load(str(run / RESOLVED_CONFIG), ["--output", str(run)])
    if config.engine != "fsdp2" or config.optimizer.name != "conda":
        raise ConfigError(f"{run}: a run with --engine fsdp2 and --optimizer.name conda is wanted")
    world = process_group.join(config.training.timeout_s)
    if world.size > 1:
        raise ConfigError("accuracy runs in one process: start it without a launcher")
    checkpoints = Checkpoints(run / CHECKPOINTS, config.checkpoint.keep, world)
    source = checkpoint or checkpoints.newest()
    if source is None:
        raise ConfigError(f"{run} holds no complete checkpoint")
    step = int(checkpoints.read_facts(source)["step"])
    engine = Fsdp2Engine(config, open_data(config, world).vocab_size, world)
    engine.load(source, step)
    found: list[tuple[Tensor, Tensor, bool]] = []
    for optimizer in engine.optimizers:
        assert isinstance(optimizer, Conda)
        for state in optimizer.state.values():
            if "basis" not in state or bool((state["basis_step"] < 0).any()):
                continue
            pairs = (matrices(local(state[key])) for key in ("exp_avg", "basis"))
            for momentum, basis in zip(*pairs, strict=True):
                if not momentum.any():  # of an expert that gets no tokens any more
                    continue
                found.append((momentum, basis, momentum.shape[0] >= momentum.shape[1]))
    if not found:
        raise ConfigError(f"{source}: no matrix has taken a basis there")
    return found, step


def measure(momentum: Tensor, basis: Tensor, right: bool) -> dict[str, Accuracy]:
    """A refresh of one matrix by each method, by its name; see :func:`load` for the arguments.

    Raises:
        LinAlgError: A method finds no basis, as of a momentum that is zero or not finite.
    """
    projected = momentum.double() if right else momentum.double().mT
    whole = projected @ basis.double().mT
    gram = whole.mT @ whole
    _, values, vectors = torch.linalg.svd(whole, full_matrices=False)
    best = float(values[: _quarter(basis)].square().sum() / values.square().sum())

    def judged(found: Tensor, milliseconds: float = 0.0) -> Accuracy:
        found = found.double()
        turned = found.mT @ gram @ found
        diagonal = turned.diagonal()
        residual = (turned - diagonal.diag()).norm() / turned.norm()
        held = float(diagonal[: _quarter(basis)].sum() / diagonal.sum())
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        drift = (found.mT @ found - identity).abs().max()
        return Accuracy(float(residual), held / best, float(drift), milliseconds)

    accuracies = {BEFORE: judged(basis), EXACT: judged(vectors.mT)}
    for method in REFRESH_METHODS:
        start = time.perf_counter()
        outcome, rotation = decompose(momentum, right, method)
        took = 1e3 * (time.perf_counter() - start)
        if outcome != Outcome.DONE or rotation is None:
            raise LinAlgError(f"{method}: {outcome.name}")
        # As a run would keep it: rounded once, with its rotation.
        rotation = rotation.to(torch.promote_types(basis.dtype, torch.float32))
        turned = project(basis, orthonormal(rotation, basis), right=True)
        accuracies[method] = judged(turned.to(basis.dtype), took)
    return accuracies


def _quarter(basis: Tensor) -> int:
    return max(basis.shape[-1] // 4, 1)


def tabulate(found: dict[str, list[Accuracy]], title: str) -> Table:
    """The accuracies of all matrices, by basis."""
    made = Table(title=title)
    for heading in ("basis", "residual", "leading quarter", "orthonormality", "ms"):
        made.add_column(heading, justify="left" if heading == "basis" else "right", no_wrap=True)
    for name, accuracies in found.items():
        rows = [(a.residual, a.quarter, a.orthonormality) for a in accuracies]
        residuals, quarters, drifts = zip(*rows, strict=True)
        median = statistics.median
        took = median(a.milliseconds for a in accuracies)
        made.add_row(
            name,
            f"{median(residuals):.1e} ({max(residuals):.1e})",
            f"{median(quarters):.5f} ({min(quarters):.5f})",
            f"{median(drifts):.1e} ({max(drifts):.1e})",
            f"{took:.2f}" if took else "",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
