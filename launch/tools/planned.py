"""A model's shapes with what optimizers cost them: the tables and the picture of `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.model import empty_model, parameter_count
from conda_dist.launch.job.picture import new_figure
from conda_dist.launch.tools import forecast
from conda_dist.launch.tools.forecast import Forecast, Seconds
from conda_dist.launch.tools.hardware import AXES, Hardware, Mesh

CONFIGS = Path(__file__).parents[2] / "configs"
SCALES = ("llama_7b", "llama_70b", "llama_405b")
RANKS = [2**k for k in range(13)]
GIB = 2**30
DELAY = 20
"""Steps of a background refresh that is shown beside a job without any."""


class Planned:
    """A model's shapes with what optimizers cost them on a mesh.

    Args:
        config: The pretraining job's config, of which model and Conda's keys are read.
        mesh: The ranks.
        tokens: Tokens of a step on each data-parallel rank.
    """

    def __init__(self, config: Config, mesh: Mesh, tokens: int) -> None:
        if mesh.tp > 1 and config.model.architecture != "llama":
            raise ConfigError("tensor parallelism is planned for LLaMA only; leave tp out")
        self.mesh, self._tokens = mesh, tokens
        self._settings = config.optimizer.conda.with_preset()
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
            found, self.mesh, hardware, parameters=self.parameters, tokens=self._tokens
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
        ways = {"sync": 0, f"async, bases taken {self._delay} steps later": self._delay}
        if self._settings.basis_source == "gradients":  # not in the background
            ways = {"sync": 0}
        for refresh, delay in ways.items():
            stall = time.stall(delay)
            share = stall / gap / (time.training + time.step)
            console.print(
                f"a refresh every {gap} steps, {refresh}: {_time(stall)} nothing goes on, "
                f"{share:.2%} of the training time"
            )
        console.print(
            f"the busiest owner decomposes for {_time(time.busiest)}, in tasks that wait for each "
            f"other {_time(time.decompose)}; exchanges and rotations take {_time(time.exchange)}; "
            f"forward and backward {_time(time.training)} a step"
        )
        if self._settings.basis_source == "gradients":
            return  # the host's time was measured for the other rule
        console.print(
            f"the host is busy for {_time(time.host)} of a step, in which the device runs "
            f"{forecast.launches(self.conda)} kernels for {self.conda.updates} matrices; neither "
            "grows with the ranks"
        )

    def _weights(self) -> Table:
        axes = ", ".join(f"{a} {n}" for a, n in zip(AXES, self.mesh.sizes, strict=True))
        table = _table(
            f"Conda on {self.mesh.ranks} ranks ({axes}), {self.parameters / 1e9:.1f} B parameters, "
            f"{self._settings.refresh_method}",
            ("weight", "shape", "stored -> computed", "basis"),
            ("state MiB", "sent a step MiB", "more a refresh MiB", "GFLOP a step"),
        )
        for kind in self.conda.kinds:
            plan = kind.plan
            moved = "" if plan.compute == plan.storage else f" -> {plan.compute}"
            shape = "x".join(map(str, plan.storage.shape))
            sizes = (f"{size / 2**20:.1f}" for size in (kind.state, kind.step, kind.refresh))
            what = f"{kind.count} x {kind.name}", shape, f"{plan.storage}{moved}", str(plan.basis)
            table.add_row(*what, *sizes, f"{kind.flops / 1e9:.1f}")
        return table

    def _totals(self, hardware: Hardware, name: str) -> Table:
        table = _table(
            f"the busiest rank, seconds on {name}, {self._tokens} tokens a rank",
            ("optimizer",),
            (
                *("state GiB", "sent a step GiB", "more a refresh GiB", "TFLOP a step"),
                *("step", "of the training step", "mean with refreshes"),
            ),
        )
        for title, found in {"Conda, sharded": self.conda, **self.rivals()}.items():
            time, too_much = self.seconds(found, hardware), found.state > hardware.capacity
            if too_much:
                table.caption = "! more than the device's memory"
            table.add_row(
                title,
                f"{found.state / GIB:.2f}" + "!" * too_much,
                f"{sum(found.step.values()) / GIB:.3f}",
                f"{sum(found.refresh.values()) / GIB:.3f}",
                f"{found.flops / 1e12:.2f}",
                _time(time.step),
                f"{time.step / (time.training + time.step):.1%}",
                _time(self.per_step(found, hardware)),
            )
        return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def draw_scaling(path: Path, hardware: Hardware, tokens: int, keys: Sequence[str]) -> None:
    """Draws seconds and state against the number of ranks, FSDP2 alone, for SCALES."""
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
