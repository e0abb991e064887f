"""Layer: launch. What Conda would cost a model on any mesh and hardware, without running anything.

    python -m conda_dist.launch.plan --model configs/llama_7b.toml --mesh dp_shard=64 \\
        [--tp 8] [--hardware h100-ib400] [--optimizer.conda.update_proj_gap 200]
    python -m conda_dist.launch.plan --scaling plan.png

The first prints what each weight gets and what a step and a refresh cost beside AdamW, Muon and a
Conda that every rank has whole; keys of Conda are given as to the pretraining job. The second
draws the cost against the number of ranks for LLaMA 7B, 70B and 405B. Bytes are those of the
optimizer's own plans, which tests hold to counted runs; seconds are arithmetic with the rates that
`hardware.py` states.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import forecast, options
from .config import Config, ConfigError
from .forecast import AXES, Forecast, Mesh, Seconds
from .hardware import HARDWARE, Hardware
from .model import empty_model, parameter_count
from .picture import check_picture, new_figure
from .pretrain import EXIT_CONFIG

CONFIGS = Path(__file__).parents[1] / "configs"
SCALES = ("llama_7b", "llama_70b", "llama_405b")
RANKS = [2**k for k in range(13)]
GIB = 2**30
MOST_RANKS = 2**16
DELAY = 20
"""Steps of a background refresh that is shown beside a job without any."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan, or draws the picture; returns the exit code."""
    given, keys = _parser().parse_known_args(arguments)
    try:
        if given.scaling:
            if given.model is not None or given.mesh or given.tp is not None:
                raise ConfigError("--scaling draws its own models and meshes: leave the others out")
            check_picture("--scaling", given.scaling)
            draw_scaling(given.scaling, HARDWARE[given.hardware], given.tokens_per_rank, keys)
            print(f"drawn in {given.scaling}")
            return 0
        if given.model is None or not given.mesh:
            raise ConfigError("name a --model and a --mesh, such as dp_shard=64 (or --scaling)")
        mesh = read_mesh(given.mesh, given.tp)
        config = options.load(str(given.model), keys)
        Planned(config, mesh, given.tokens_per_rank).show(HARDWARE[given.hardware], given.hardware)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conda_dist.launch.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, help="a TOML file of the pretraining job")
    parser.add_argument(
        "--mesh", nargs="+", default=[], metavar="AXIS=N", help=f"ranks along {', '.join(AXES)}"
    )
    parser.add_argument("--tp", type=int, help="the same as tp=N in --mesh")
    parser.add_argument("--hardware", choices=HARDWARE, default="h100-ib400")
    parser.add_argument(
        "--tokens-per-rank",
        type=options.positive,
        default=8192,
        help="tokens of a step on each data-parallel rank (default 8192)",
    )
    parser.add_argument("--scaling", type=Path, metavar="PNG", help="draw cost against ranks")
    return parser


def read_mesh(axes: Sequence[str], tp: int | None = None) -> Mesh:
    """The mesh of words such as "dp_shard=64".

    Raises:
        ConfigError: an axis is unknown or named twice, its number is not a positive one, or there
            would be more ranks than a plan can look at.
    """
    sizes: dict[str, int] = {} if tp is None else {"tp": tp}
    for word in axes:
        name, _, number = word.partition("=")
        if name not in AXES:
            raise ConfigError(f"--mesh has no axis {name!r}; it has {', '.join(AXES)}")
        if name in sizes:
            raise ConfigError(f"{name} is given twice")
        sizes[name] = int(number) if number.isdecimal() else 0
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be a positive number of ranks, as in {name}=8")
    mesh = Mesh(**sizes)
    if mesh.ranks > MOST_RANKS:
        raise ConfigError(f"{mesh.ranks} ranks are more than the {MOST_RANKS} that can be planned")
    return mesh


class Planned:
    """A model's shapes with what optimizers cost them on a mesh.

    Args:
        config: The pretraining job's config, of which model and Conda's keys are read.
        mesh: The ranks.
        tokens: Tokens of a step on each data-parallel rank.

    Raises:
        ConfigError: Tensor parallelism is asked for another architecture than LLaMA's.
    """

    def __init__(self, config: Config, mesh: Mesh, tokens: int) -> None:
        if mesh.tp > 1 and config.model.architecture != "llama":
            raise ConfigError("tensor parallelism is planned for LLaMA only; leave tp out")
        self.mesh, self._tokens = mesh, tokens
        self._settings = config.optimizer.conda
        model = empty_model(config.model, config.training, config.tokenizer.vocab_size)
        self.projected, self.others = forecast.named_shapes(model)
        self.parameters = parameter_count(model)
        self.conda = forecast.forecast_conda(self.projected, self.others, mesh, self._settings)

    def rivals(self) -> dict[str, Forecast]:
        """What other ways would cost."""
        shapes = self.projected, self.others, self.mesh
        return {
            "AdamW, sharded": forecast.forecast_adamw(*shapes),
            "Muon, gathered to owners": forecast.forecast_muon(*shapes),
            "Conda, replicated (as released)": forecast.forecast_replicated(*shapes),
        }

    def seconds(self, found: Forecast, hardware: Hardware) -> Seconds:
        """Time that a forecast takes, with this job's products."""
        return forecast.seconds(
            found,
            self.mesh,
            hardware,
            parameters=self.parameters,
            tokens=self._tokens,
        )

    def per_step(self, found: Forecast, hardware: Hardware) -> float:
        """Mean seconds of a step, its share of a refresh included."""
        time, gap = self.seconds(found, hardware), int(self._settings.update_proj_gap)
        hidden = self._delay if found is self.conda and self._settings.refresh_delay else 0
        return time.step + time.stall(hidden) / gap

    @property
    def _delay(self) -> int:
        """Steps a refresh in the background takes: the job's, or what is shown beside."""
        return min(self._settings.refresh_delay or DELAY, int(self._settings.update_proj_gap))

    def show(self, hardware: Hardware, name: str) -> None:
        """Prints the tables."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
        console.print(self._weights())
        console.print(self._totals(hardware, name))
        time, gap = self.seconds(self.conda, hardware), self._settings.update_proj_gap
        every = f"every {gap} steps"
        stalls = {
            "sync": time.stall(0),
            "async": time.stall(self._delay),
        }
        for refresh, stall in stalls.items():
            share = stall / gap / (time.training + time.step)
            after = f", bases taken {self._delay} steps later" * (refresh == "async")
            console.print(
                f"a refresh {every}, {refresh}{after}: {_time(stall)} nothing goes on, "
                f"{share:.2%} of the training time"
            )
        console.print(
            f"the busiest owner decomposes for {_time(time.busiest)}, in waves that wait for each "
            f"other {_time(time.decompose)}; exchanges and rotations take {_time(time.exchange)}; "
            f"forward and backward {_time(time.training)} a step"
        )

    def _weights(self) -> Table:
        rate = self._settings
        table = Table(
            title=f"Conda on {self.mesh.ranks} ranks "
            f"({', '.join(f'{a} {n}' for a, n in zip(AXES, self.mesh.sizes, strict=True))}), "
            f"{self.parameters / 1e9:.1f} B parameters, {rate.refresh_method}"
        )
        for heading in ("weight", "shape", "stored -> computed", "basis"):
            table.add_column(heading, overflow="fold")
        for heading in ("state MiB", "sent a step MiB", "more a refresh MiB", "GFLOP a step"):
            table.add_column(heading, justify="right")
        for kind in self.conda.kinds:
            plan = kind.plan
            moved = "" if plan.compute == plan.storage else f" -> {plan.compute}"
            table.add_row(
                f"{kind.count} x {kind.name}",
                "x".join(map(str, plan.storage.shape)),
                f"{plan.storage}{moved}",
                str(plan.basis),
                f"{kind.state / 2**20:.1f}",
                f"{kind.step / 2**20:.1f}",
                f"{kind.refresh / 2**20:.1f}",
                f"{kind.flops / 1e9:.1f}",
            )
        return table

    def _totals(self, hardware: Hardware, name: str) -> Table:
        table = Table(title=f"the busiest rank, seconds on {name}, {self._tokens} tokens a rank")
        table.add_column("optimizer")
        for heading in (
            "state GiB", "sent a step GiB", "more a refresh GiB", "TFLOP a step",
            "step", "of the training step", "mean with refreshes",
        ):  # fmt: skip
            table.add_column(heading, justify="right")
        for title, found in {"Conda, sharded": self.conda, **self.rivals()}.items():
            time = self.seconds(found, hardware)
            table.add_row(
                title,
                f"{found.state / GIB:.2f}" + "!" * (found.state > hardware.capacity),
                f"{sum(found.step.values()) / GIB:.3f}",
                f"{sum(found.refresh.values()) / GIB:.3f}",
                f"{found.flops / 1e12:.2f}",
                _time(time.step),
                f"{time.step / (time.training + time.step):.1%}",
                _time(self.per_step(found, hardware)),
            )
        if any(found.state > hardware.capacity for found in (self.conda, *self.rivals().values())):
            table.caption = "! more than the device's memory"
        return table


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def draw_scaling(path: Path, hardware: Hardware, tokens: int, keys: Sequence[str]) -> None:
    """Draws seconds and state against the number of ranks, FSDP2 alone, for three sizes of LLaMA.

    Raises:
        ConfigError: A key is none of the job's.
    """
    figure, axes = new_figure(2 * len(SCALES))
    for i, name in enumerate(SCALES):
        config = options.load(str(CONFIGS / f"{name}.toml"), keys)
        curves: dict[str, list[tuple[float, float]]] = {}
        for ranks in RANKS:
            planned = Planned(config, Mesh(dp_shard=ranks), tokens)
            for title, found in {"Conda, sharded": planned.conda, **planned.rivals()}.items():
                point = planned.per_step(found, hardware), found.state / GIB
                curves.setdefault(title, []).append(point)
        for title, points in curves.items():
            times, states = zip(*points, strict=True)
            axes[2 * i].plot(RANKS, times, marker="o", markersize=3, label=title)
            axes[2 * i + 1].plot(RANKS, states, marker="o", markersize=3, label=title)
        axes[2 * i].set(title=name, ylabel="optimizer's seconds a step, refreshes included")
        axes[2 * i + 1].set(title=name, ylabel="optimizer's state of a rank, GiB")
        axes[2 * i + 1].axhline(hardware.capacity / GIB, color="#999999", linestyle=":")
    for axis in axes:
        axis.set(xlabel="ranks", xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
