"""torchtitan jobs for the tests: layouts, with the same batches and initial weights in all."""

import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ranks
import titan_cpu
import titan_data

STEPS = 7

CONDA = (
    "--optimizer.name=conda",
    "--optimizer.lr=5e-3",
    "--optimizer.scale=1.0",
    "--optimizer.update_proj_gap=3",
)
"""Three refreshes in seven steps, and a scale at which no refresh at all (or a projected path that
does nothing) moves the losses by some per cent, a hundred times the tolerances."""

OVERRIDE = (
    "--override.imports",
    "conda_dist.integrations.torchtitan.override.conda"
    '={"lr": 5e-3, "scale": 1.0, "update_proj_gap": 3}',
)
"""The same by torchtitan's own overrides."""


class Layout(NamedTuple):
    """Ranks along each kind of parallelism; data are sharded over what is left."""

    name: str
    world: int
    replicate: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def readers(self) -> int:
        """Ranks that read different data."""
        return self.world // (self.tensor * self.pipeline)

    def arguments(self) -> list[str]:
        return [
            f"--parallelism.data_parallel_replicate_degree={self.replicate}",
            f"--parallelism.tensor_parallel_degree={self.tensor}",
            f"--parallelism.pipeline_parallel_degree={self.pipeline}",
            f"--parallelism.expert_parallel_degree={self.expert}",
            "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        ]


ONE = Layout("one", 1)
FSDP = Layout("FSDP-2", 2)
HSDP = Layout("HSDP-2x2", 4, replicate=2)
FSDP_TP = Layout("FSDP-2-TP-2", 4, tensor=2)
PP = Layout("PP-2", 2, pipeline=2)
EP = Layout("EP-2", 2, expert=2)
EP_TP = Layout("EP-2-TP-2", 4, tensor=2, expert=2)


@functools.cache
def _workspace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="titan-")


@functools.cache
def folder() -> Path:
    """The folder that the jobs run in, removed when the tests end."""
    path = Path(_workspace().name)
    titan_data.write_tokenizer(path / "tests/assets/tokenizer")
    titan_data.write_data(path / "tests/assets", 1).rename(path / "tests/assets/c4_test")
    return path


@functools.cache
def data(readers: int, start: int) -> Path:
    return titan_data.write_data(folder(), readers, start)


@functools.cache
def seed(config: str) -> Path:
    """torchtitan's seed checkpoint of a config: initial weights in which no layout has a part."""
    output = folder() / f"seed-{config}"
    options = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    ranks.run(
        1,
        titan_cpu.job,
        "launcher",
        folder(),
        [*arguments(ONE, config), *CONDA, *options, f"--dump_folder={output}"],
    )
    return output / "checkpoint/step-0"


def arguments(layout: Layout, config: str, start: int = 0) -> list[str]:
    """A command line for a layout, whose data begin with global batch ``start``."""
    return [
        "--module=titan_configs",
        f"--config={config}",
        f"--training.steps={STEPS}",
        f"--training.seq_len={titan_data.SEQUENCE}",
        f"--training.local_batch_size={titan_data.BATCH // layout.readers}",
        f"--dataloader.dataset_path={data(layout.readers, start)}",
        "--validator.no-enable",
        "--debug.seed=1",
        *layout.arguments(),
    ]


def run(
    layout: Layout, config: str, *options: str, route: str = "launcher", start: int = 0
) -> list[titan_cpu.Run]:
    """What each rank logged of a job that begins with the seed checkpoint.

    It writes no checkpoint, unless ``options`` have a ``--dump_folder``.
    """
    saved = any(option.startswith("--dump_folder") for option in options)
    given = [
        *arguments(layout, config, start),
        "--checkpoint.enable",
        f"--checkpoint.initial_load_path={seed(config)}",
        *([] if saved else ["--checkpoint.load_only"]),
        *options,
    ]
    return ranks.run(layout.world, titan_cpu.job, route, folder(), given)


def refusals(
    layout: Layout, config: str, *options: str, route: str = "launcher", timeout: float = 60.0
) -> list[str]:
    """What each rank said of a job that must not start."""
    given = [*arguments(layout, config), *options]
    return ranks.run(layout.world, titan_cpu.refusal, route, folder(), given, timeout=timeout)


@functools.cache
def conda_runs(layout: Layout, config: str, *options: str) -> list[titan_cpu.Run]:
    """What each rank logged of a Conda run."""
    return run(layout, config, *CONDA, *options)


def trajectory(layout: Layout, config: str, *options: str) -> list[float]:
    """The losses of a Conda run."""
    return losses(conda_runs(layout, config, *options))


def losses(runs: Sequence[titan_cpu.Run]) -> list[float]:
    """The losses as the last rank logged them: of pipeline ranks, only that one knows them."""
    return runs[-1].losses


def distance(found: Iterable[float], expected: Iterable[float]) -> float:
    """The largest relative distance between two trajectories of equal length."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def messages(runs: Sequence[titan_cpu.Run]) -> str:
    """All that all ranks logged, as one text."""
    return "\n".join(message for each in runs for message in each.messages)
