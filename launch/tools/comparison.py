"""What the runs of a comparison found: their tables and pictures.

Each kind writes NAME.json, NAME.md and NAME.png into the comparison's folder, and returns the
table's text and where the picture is.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from conda_dist.launch.job.files import METRICS
from conda_dist.launch.job.metrics import read_metrics
from conda_dist.launch.job.picture import new_figure
from conda_dist.launch.tools.sweeps import Trial

BASELINE = "adamw"
"""The optimizer whose final loss the others race to; the first one where it is not compared."""

_COLOURS = {
    **{"conda": "#c8501e", "adamw": "#1f5a94", "muon": "#3d8b4f"},
    **{"svd": "#1f5a94", "orthogonal_iteration": "#c8501e", "eigh64": "#3d8b4f"},
}


def _write(folder: Path, name: str, record: Any, header: Sequence[str], rows: Any) -> str:
    """Writes NAME.json and NAME.md, and returns the latter's text."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    text = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    return text


def _save(figure: Any, path: Path) -> str:
    figure.savefig(path, dpi=150)
    return f"curves in {path}"


# Optimizers


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


def show_optimizers(trials: Sequence[Trial], folder: Path) -> tuple[str, str]:
    """Each run beside the baseline's best; the best runs' validation curves."""
    outcomes = [read_outcome(trial.folder, trial.name, trial.lr) for trial in trials]
    rows = sorted(tabulate(outcomes), key=lambda row: (not row.best, row.val_loss))
    best = best_of(outcomes)
    baseline = best.get(BASELINE) or outcomes[0]
    header = ["optimizer", "lr", "final val loss"]
    header += [f"steps to {baseline.optimizer}'s final loss", "seconds to it"]
    header += ["optimizer ms/step", "share of step"]
    cells = [
        [
            f"**{row.optimizer}**" if row.best else row.optimizer,
            f"{row.lr:g}",
            f"{row.val_loss:.4f}",
            _reached(row.steps_to_baseline, row.steps_ratio),
            _reached(row.seconds_to_baseline, row.seconds_ratio),
            f"{1000 * row.optimizer_s_per_step:.1f}",
            f"{row.optimizer_share:.0%}",
        ]
        for row in rows
    ]
    record = {"baseline": baseline.optimizer, "runs": [asdict(row) for row in tabulate(outcomes)]}
    text = _write(folder, "comparison", record, header, cells)
    figure, axes = new_figure(2)
    for axis, unit in zip(axes, ("step", "train_s"), strict=True):
        axis.axhline(baseline.final.val_loss, color="#777777", linewidth=0.8, linestyle="--")
        for name, outcome in best.items():
            x = [getattr(point, unit) for point in outcome.points]
            y = [point.val_loss for point in outcome.points]
            label = f"{name}, lr {outcome.lr:g}: {y[-1]:.3f}"
            axis.plot(x, y, color=_COLOURS.get(name), label=label)
            if reached := outcome.first_at(baseline.final.val_loss):
                axis.plot(getattr(reached, unit), reached.val_loss, "o", color=_COLOURS.get(name))
        axis.set_ylabel("validation loss (nats per token)")
        axis.set_ylim(top=_top(outcomes))
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("seconds of training")
    axes[0].legend(frameon=False, title=f"dashed: {baseline.optimizer}'s final loss")
    return text, _save(figure, folder / "comparison.png")


def _top(outcomes: Sequence[Outcome]) -> float:
    """Upper end of the loss axis: past the first fall, which would squeeze all the rest."""
    lowest = min(outcome.final.val_loss for outcome in outcomes)
    highest = max(outcome.points[0].val_loss for outcome in outcomes)
    return lowest + 0.75 * (highest - lowest) + 1e-3


def _reached(amount: float | None, ratio: float | None) -> str:
    return "not reached" if amount is None else f"{amount:.0f} ({ratio:.2f}x)"


# Engines

_KINDS = {"loss": "training", "val_loss": "validation"}


@dataclass(frozen=True, slots=True)
class Curve:
    """The losses of one complete run, by step."""

    name: str
    loss: dict[int, float]
    val_loss: dict[int, float]


@dataclass(frozen=True, slots=True)
class Distance:
    """Where two curves are farthest apart."""

    distance: float
    """In nats per token."""
    kind: str
    """`loss` (of training) or `val_loss`."""
    step: int
    one: str
    other: str


def read_curve(folder: Path, name: str) -> Curve:
    """Reads what a complete run has left in its folder."""
    lines = read_metrics(folder / METRICS)
    by_kind = (
        {line["step"]: line[kind] for line in lines if line[kind] is not None} for kind in _KINDS
    )
    return Curve(name, *by_kind)


def farthest(one: Curve, other: Curve) -> Distance:
    """The greatest distance between two curves, at any step that both have."""
    found = [
        Distance(abs(losses[step] - getattr(other, kind)[step]), kind, step, one.name, other.name)
        for kind in _KINDS
        for losses in [getattr(one, kind)]
        for step in losses.keys() & getattr(other, kind).keys()
    ]
    return max(found, key=lambda each: each.distance)


def show_engines(trials: Sequence[Trial], folder: Path) -> tuple[str, str]:
    """How far apart the engines' losses are, the farthest pair first; their training curves."""
    curves = [read_curve(trial.folder, trial.name) for trial in trials]
    pairs = [farthest(one, other) for one, other in combinations(curves, 2)]
    pairs.sort(key=lambda each: -each.distance)
    rows = [
        [f"{each.one}, {each.other}", f"{each.distance:.2e}", _KINDS[each.kind], str(each.step)]
        for each in pairs
    ]
    header = ("engines", "greatest distance", "of", "at step")
    text = _write(folder, "engines", [asdict(each) for each in pairs], header, rows)
    figure, (left, right) = new_figure(2)
    reference = curves[-1]
    for index, curve in enumerate(curves):
        # Curves that lie on each other are told apart by dashes that leave the others visible.
        dashes = (index * 4, (4, 4 * (len(curves) - 1)))
        label = f"{curve.name}: {list(curve.loss.values())[-1]:.6f}"
        left.plot(curve.loss.keys(), curve.loss.values(), linestyle=dashes, label=label)
        steps = sorted(curve.loss.keys() & reference.loss.keys())
        distances = [max(abs(curve.loss[s] - reference.loss[s]), 1e-9) for s in steps]
        if curve is not reference:
            right.plot(steps, distances, linewidth=0.9, label=curve.name)
    right.set_yscale("log")
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.set(xlabel="step", ylabel=f"distance from {reference.name} (nats per token)")
    left.legend(frameon=False, title="final training loss")
    right.legend(frameon=False)
    return text, _save(figure, folder / "engines.png")


# Refresh methods and intervals


@dataclass(frozen=True, slots=True)
class Pair:
    """What one method reached at one interval."""

    method: str
    gap: int
    """Steps between refreshes."""
    val_losses: tuple[float, ...]
    """At the end, by seed."""
    optimizer_s: float
    """Seconds in the optimizer for a step, refreshes included: the median run's mean."""

    @property
    def mean(self) -> float:
        """The mean final validation loss."""
        return statistics.mean(self.val_losses)


def show_refreshes(trials: Sequence[Trial], folder: Path) -> tuple[str, str]:
    """The final losses of each method and interval beside the optimizer's time, lowest first."""
    pairs = []
    for name in dict.fromkeys(trial.name for trial in trials):
        own = [trial for trial in trials if trial.name == name]
        conda, found = own[0].config.optimizer.conda, [read_outcome(t.folder, name, 0) for t in own]
        losses = tuple(outcome.final.val_loss for outcome in found)
        taken = statistics.median(outcome.optimizer_s for outcome in found)
        pairs.append(Pair(conda.refresh_method, conda.update_proj_gap, losses, taken))
    return write_refreshes(pairs, folder), _draw_refreshes(pairs, folder)


def write_refreshes(pairs: Sequence[Pair], folder: Path) -> str:
    """Writes intervals.json and intervals.md, and returns the latter's text."""
    rows = [
        [
            pair.method,
            str(pair.gap),
            ", ".join(f"{loss:.3f}" for loss in pair.val_losses),
            f"{pair.mean:.3f}",
            f"{1000 * pair.optimizer_s:.1f}",
        ]
        for pair in sorted(pairs, key=lambda pair: pair.mean)
    ]
    header = ("method", "interval", "final validation loss", "mean", "optimizer ms/step")
    return _write(folder, "intervals", [asdict(pair) for pair in pairs], header, rows)


def _draw_refreshes(pairs: Sequence[Pair], folder: Path) -> str:
    figure, (left, right) = new_figure(2)
    for method in dict.fromkeys(pair.method for pair in pairs):
        own = sorted((p for p in pairs if p.method == method), key=lambda pair: pair.gap)
        colour, means = _COLOURS[method], [pair.mean for pair in own]
        left.plot([pair.gap for pair in own], means, color=colour, label=method)
        times = [1000 * pair.optimizer_s for pair in own]
        right.plot(times, means, color=colour, marker="o", markersize=3)
        for pair, time in zip(own, times, strict=True):
            gaps = [pair.gap] * len(pair.val_losses)
            left.plot(gaps, pair.val_losses, "o", markersize=3, color=colour)
            right.annotate(f" {pair.gap}", (time, pair.mean), color=colour)
    left.set_xscale("log")
    left.set(xlabel="steps between refreshes", ylabel="final validation loss (nats per token)")
    right.set(xlabel="optimizer, ms per step (numbers: steps between refreshes)")
    left.legend(frameon=False, title="lines: means over seeds")
    return _save(figure, folder / "intervals.png")
