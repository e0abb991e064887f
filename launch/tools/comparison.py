"""Layer: launch. What a comparison found: outcomes of its runs, their table and their picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conda_dist.launch.job.metrics import METRICS, read_metrics
from conda_dist.launch.job.picture import new_figure

BASELINE = "adamw"
"""The optimizer whose final loss the others race to; the first one where it is not compared."""

_COLOURS = {"conda": "#c8501e", "adamw": "#1f5a94", "muon": "#3d8b4f"}


@dataclass(frozen=True, slots=True)
class Point:
    """One validation."""

    step: int
    train_s: float
    """Seconds of training up to it."""
    val_loss: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run reached."""

    optimizer: str
    lr: float
    points: tuple[Point, ...]
    optimizer_s: float
    """Mean seconds per step in the optimizer."""
    step_s: float
    """Mean seconds per step."""

    @property
    def final(self) -> Point:
        """The last validation."""
        return self.points[-1]

    def first_at(self, loss: float) -> Point | None:
        """The first validation at or below a loss."""
        return next((point for point in self.points if point.val_loss <= loss), None)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; None: the baseline's final loss was never reached."""

    optimizer: str
    lr: float
    best: bool
    """Whether this is its optimizer's best run."""
    val_loss: float
    steps_to_baseline: int | None
    steps_ratio: float | None
    """Steps to the baseline's final loss, as a share of the baseline's steps."""
    seconds_to_baseline: float | None
    seconds_ratio: float | None
    optimizer_s_per_step: float
    optimizer_share: float
    """Of the step's time."""


def read_outcome(folder: Path, optimizer: str, lr: float) -> Outcome:
    """Reads what a complete run has left in its folder."""
    lines = read_metrics(folder / METRICS)
    points = tuple(
        Point(line["step"], line["train_s"], line["val_loss"])
        for line in lines
        if line["val_loss"] is not None
    )
    steps = max(1, len(lines))
    return Outcome(
        optimizer,
        lr,
        points,
        sum(line["optimizer_s"] for line in lines) / steps,
        sum(line["step_s"] for line in lines) / steps,
    )


def best_of(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Each optimizer's run of the lowest final validation loss, in the order of the runs."""
    best: dict[str, Outcome] = {}
    for outcome in outcomes:
        held = best.get(outcome.optimizer)
        if held is None or outcome.final.val_loss < held.final.val_loss:
            best[outcome.optimizer] = outcome
    return best


def tabulate(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per run, measured against the baseline's best run."""
    best = best_of(outcomes)
    baseline = best.get(BASELINE) or next(iter(best.values()))
    target = baseline.final
    rows = []
    for outcome in outcomes:
        reached = outcome.first_at(target.val_loss)
        rows.append(
            Row(
                optimizer=outcome.optimizer,
                lr=outcome.lr,
                best=best[outcome.optimizer] is outcome,
                val_loss=outcome.final.val_loss,
                steps_to_baseline=reached.step if reached else None,
                steps_ratio=reached.step / target.step if reached else None,
                seconds_to_baseline=reached.train_s if reached else None,
                seconds_ratio=reached.train_s / target.train_s if reached else None,
                optimizer_s_per_step=outcome.optimizer_s,
                optimizer_share=outcome.optimizer_s / outcome.step_s if outcome.step_s else 0.0,
            )
        )
    return rows


def write_tables(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Writes comparison.json and comparison.md, and returns the latter's text."""
    rows = tabulate(outcomes)
    baseline = BASELINE if BASELINE in best_of(outcomes) else outcomes[0].optimizer
    text = _markdown(rows, baseline)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(
        json.dumps({"baseline": baseline, "runs": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    (folder / "comparison.md").write_text(text)
    return text


def draw(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Draws each optimizer's best validation curve against steps and against seconds."""
    best = best_of(outcomes)
    baseline = best.get(BASELINE) or next(iter(best.values()))
    figure, axes = new_figure(2)
    for axis, unit in zip(axes, ("step", "train_s"), strict=True):
        axis.axhline(baseline.final.val_loss, color="#777777", linewidth=0.8, linestyle="--")
        for name, outcome in best.items():
            x = [getattr(point, unit) for point in outcome.points]
            y = [point.val_loss for point in outcome.points]
            label = f"{name}, lr {outcome.lr:g}: {y[-1]:.3f}"
            axis.plot(x, y, color=_COLOURS.get(name), label=label)
            reached = outcome.first_at(baseline.final.val_loss)
            if reached is not None:
                axis.plot(getattr(reached, unit), reached.val_loss, "o", color=_COLOURS.get(name))
        axis.set_ylabel("validation loss (nats per token)")
        axis.set_ylim(top=_top(outcomes))
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("seconds of training")
    axes[0].legend(frameon=False, title=f"dashed: {baseline.optimizer}'s final loss")
    path = folder / "comparison.png"
    figure.savefig(path, dpi=150)
    return path


def _top(outcomes: Sequence[Outcome]) -> float:
    """Upper end of the loss axis: past the first fall, which would squeeze all the rest."""
    finals = [outcome.final.val_loss for outcome in outcomes]
    starts = [outcome.points[0].val_loss for outcome in outcomes]
    return min(finals) + 0.75 * (max(starts) - min(finals)) + 1e-3


def _markdown(rows: Sequence[Row], baseline: str) -> str:
    header = [
        "optimizer",
        "lr",
        "final val loss",
        f"steps to {baseline}'s final loss",
        "seconds to it",
        "optimizer ms/step",
        "share of step",
    ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in sorted(rows, key=lambda row: (not row.best, row.val_loss)):
        steps = _reached(row.steps_to_baseline, row.steps_ratio)
        seconds = _reached(row.seconds_to_baseline, row.seconds_ratio)
        cells = [
            f"**{row.optimizer}**" if row.best else row.optimizer,
            f"{row.lr:g}",
            f"{row.val_loss:.4f}",
            steps,
            seconds,
            f"{1000 * row.optimizer_s_per_step:.1f}",
            f"{row.optimizer_share:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _reached(amount: float | None, ratio: float | None) -> str:
    if amount is None or ratio is None or math.isnan(ratio):
        return "not reached"
    return f"{amount:.0f} ({ratio:.2f}x)"
