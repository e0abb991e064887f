"""What the runs of a comparison found: one table, one picture.

They are comparison.json, comparison.md and comparison.png in the comparison's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conda_dist.launch.job.files import METRICS
from conda_dist.launch.job.metrics import read_metrics
from conda_dist.launch.job.picture import new_figure
from conda_dist.launch.tools.sweeps import Trial

BASELINE = "adamw"
"""The optimizer whose best run the others are measured by; without it, the first run is."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one complete run has left."""

    name: str
    optimizer: str
    lr: float
    lines: list[dict[str, Any]]
    """Of its metrics.jsonl."""

    @property
    def points(self) -> list[dict[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if line["val_loss"] is not None]

    @property
    def val_loss(self) -> float:
        """The final validation loss, in nats per token."""
        return float(self.points[-1]["val_loss"])

    def first_at(self, loss: float) -> dict[str, Any] | None:
        """The first validation at or below a loss."""
        return next((point for point in self.points if point["val_loss"] <= loss), None)

    def farthest(self, other: Run) -> float:
        """The greatest difference of training or validation losses in a step that both have."""
        theirs = {line["step"]: line for line in other.lines}
        pairs = [(line, theirs[line["step"]]) for line in self.lines if line["step"] in theirs]
        distances: list[float] = [
            abs(one[kind] - two[kind])
            for one, two in pairs
            for kind in ("loss", "val_loss")
            if one[kind] is not None and two[kind] is not None
        ]
        return max(distances)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; None: the baseline's final loss was never reached."""

    run: str
    lr: float
    val_loss: float
    steps_to_baseline: int | None
    seconds_to_baseline: float | None
    optimizer_s_per_step: float
    optimizer_share: float
    """Of the step's time."""
    farthest_from_baseline: float
    """The greatest difference of losses in any step, in nats per token."""


def read_run(trial: Trial) -> Run:
    """Reads what a complete run has left in its folder."""
    optimizer = trial.config.optimizer
    lines = read_metrics(trial.folder / METRICS)
    return Run(trial.name, optimizer.name, optimizer.chosen.lr, lines)


def baseline_of(runs: Sequence[Run]) -> Run:
    """The run that the others are measured by."""
    candidates = [run for run in runs if run.optimizer == BASELINE]
    differ = len({run.optimizer for run in runs}) > 1
    return min(candidates, key=lambda run: run.val_loss) if candidates and differ else runs[0]


def tabulate(runs: Sequence[Run]) -> list[Row]:
    """A row for each run, the lowest final loss first."""
    baseline, rows = baseline_of(runs), []
    for run in runs:
        reached = run.first_at(baseline.val_loss)
        optimizer_s, step_s = (
            sum(line[key] for line in run.lines) / len(run.lines)
            for key in ("optimizer_s", "step_s")
        )
        rows.append(
            Row(
                run=run.name,
                lr=run.lr,
                val_loss=run.val_loss,
                steps_to_baseline=reached["step"] if reached else None,
                seconds_to_baseline=reached["train_s"] if reached else None,
                optimizer_s_per_step=optimizer_s,
                optimizer_share=optimizer_s / step_s,
                farthest_from_baseline=run.farthest(baseline),
            )
        )
    return sorted(rows, key=lambda row: row.val_loss)


def show(trials: Sequence[Trial], folder: Path) -> tuple[str, str]:
    """Writes the table and draws the validation curves.

    Returns:
        The table as Markdown, and where the picture is.
    """
    runs = [read_run(trial) for trial in trials]
    rows, baseline = tabulate(runs), baseline_of(runs)
    record = {"baseline": baseline.name, "runs": [asdict(row) for row in rows]}
    text = _markdown(rows, baseline)
    (folder / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "comparison.md").write_text(text)
    return text, f"curves in {_draw(runs, baseline, folder / 'comparison.png')}"


def _markdown(rows: Sequence[Row], baseline: Run) -> str:
    header = ["run", "lr", "final val loss", f"steps to {baseline.name}'s", "seconds to it"]
    header += ["optimizer ms/step", "share of step", f"farthest from {baseline.name}"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        steps, seconds = (
            "not reached" if amount is None else f"{amount:.0f}"
            for amount in (row.steps_to_baseline, row.seconds_to_baseline)
        )
        time, share = f"{1000 * row.optimizer_s_per_step:.1f}", f"{row.optimizer_share:.0%}"
        losses = f"{row.val_loss:.4f}", f"{row.farthest_from_baseline:.2e}"
        lines.append([row.run, f"{row.lr:g}", losses[0], steps, seconds, time, share, losses[1]])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _draw(runs: Sequence[Run], baseline: Run, path: Path) -> Path:
    figure, axes = new_figure(2)
    # The loss axis begins past the first fall, which would squeeze all the rest.
    lowest = min(run.val_loss for run in runs)
    highest = max(run.points[0]["val_loss"] for run in runs)
    units = ("step", "step"), ("train_s", "seconds of training")
    for axis, (unit, label) in zip(axes, units, strict=True):
        axis.axhline(baseline.val_loss, color="#777777", linewidth=0.8, linestyle="--")
        for run in runs:
            points = [(point[unit], point["val_loss"]) for point in run.points]
            axis.plot(*zip(*points, strict=True), label=f"{run.name}: {run.val_loss:.3f}")
        axis.set(xlabel=label, ylabel="validation loss (nats per token)")
        axis.set_ylim(top=lowest + 0.75 * (highest - lowest) + 1e-3)
    axes[0].legend(frameon=False, title=f"dashed: {baseline.name}'s final loss")
    figure.savefig(path, dpi=150)
    return path
