"""Layer: launch. How far apart the same job's losses are on different engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from conda_dist.launch.job.metrics import METRICS, read_metrics
from conda_dist.launch.job.picture import new_figure

_KINDS = ("loss", "val_loss")
_WORDS = {"loss": "training", "val_loss": "validation"}


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


def write_distances(curves: Sequence[Curve], folder: Path) -> str:
    """Writes engines.json and engines.md, the farthest pair first, and returns the latter."""
    pairs = [farthest(one, other) for one, other in combinations(curves, 2)]
    pairs.sort(key=lambda each: -each.distance)
    lines = ["| engines | greatest distance | of | at step |", "|---|---|---|---|"]
    lines += [
        f"| {each.one}, {each.other} | {each.distance:.2e} | {_WORDS[each.kind]} | {each.step} |"
        for each in pairs
    ]
    text = "\n".join(lines) + "\n"
    columns = ("distance", "kind", "step", "one", "other")
    listed = [{name: getattr(each, name) for name in columns} for each in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engines.json").write_text(json.dumps(listed, indent=1) + "\n")
    (folder / "engines.md").write_text(text)
    return text


def draw_curves(curves: Sequence[Curve], folder: Path) -> Path:
    """Draws the training losses, and how far each is from the last curve's."""
    figure, (left, right) = new_figure(2)
    reference = curves[-1]
    for index, curve in enumerate(curves):
        # Curves that lie on each other are told apart by dashes that leave the others visible.
        dashes = (index * 4, (4, 4 * (len(curves) - 1))) if len(curves) > 1 else "-"
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
    path = folder / "engines.png"
    figure.savefig(path, dpi=150)
    return path
