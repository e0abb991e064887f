"""Curves of the loss and of the optimizer's diagnostics as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conda_dist.launch.job.files import LOSS_PICTURE, METRICS, SIGNALS_PICTURE
from conda_dist.launch.job.metrics import read_metrics


def draw_loss(folder: Path, title: str) -> Path:
    """Draws the training and validation loss of a run's metrics.jsonl into its loss.png."""
    import numpy as np

    nan = float("nan")  # a gap in the curve: of a step that was skipped
    lines = read_metrics(folder / METRICS)
    figure, (axis,) = new_figure(1)
    steps = [line["step"] for line in lines]
    losses = [nan if line["loss"] is None else line["loss"] for line in lines]
    axis.plot(steps, losses, color="#a9c1d9", linewidth=0.7, label="training")
    width = max(5, len(losses) // 40)
    if len(losses) > 2 * width:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        middle = steps[width // 2 : width // 2 + len(smooth)]
        axis.plot(middle, smooth, color="#1f5a94", label=f"training, mean over {width}")
    measured = [(line["step"], line["val_loss"]) for line in lines if line["val_loss"] is not None]
    if measured:
        x, y = zip(*measured, strict=True)
        label = f"validation, {y[-1]:.3f} at the end"
        axis.plot(x, y, color="#c8501e", marker="o", markersize=3, label=label)
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axis.legend(frameon=False)
    path = folder / LOSS_PICTURE
    figure.savefig(path, dpi=150)
    return path


_PANELS = (
    ("change / weight, RMS", ("update_ratio",), "log"),
    ("norm: gradient (line), momentum (dashed)", ("gradient_norm", "momentum_norm"), "log"),
    ("staleness", ("staleness",), "linear"),
    ("effective rank", ("effective_rank",), "linear"),
)
"""Panels of the diagnostics: title, signals and scale."""


def draw_signals(folder: Path, title: str) -> Path | None:
    """Draws the diagnostics of a run's metrics.jsonl, if there are some, into its signals.png."""
    lines = read_metrics(folder / METRICS)
    paths = dict.fromkeys(name.partition("/")[0] for line in lines for name in line if "/" in name)
    if not paths:
        return None
    figure, axes = new_figure(len(_PANELS))
    figure.set_size_inches(15, 3.2)
    for axis, (what, names, scale) in zip(axes, _PANELS, strict=True):
        for kind, color in zip(paths, ("#1f5a94", "#c8501e"), strict=False):
            for name, style in zip(names, ("-", "--"), strict=False):
                key = f"{kind}/{name}"
                points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
                if points:
                    label = kind if style == "-" else None
                    axis.plot(*zip(*points, strict=True), style, color=color, label=label)
        axis.set(xlabel="step", title=what, yscale=scale)
        axis.legend(frameon=False)
    figure.suptitle(title)
    path = folder / SIGNALS_PICTURE
    figure.savefig(path, dpi=80)
    return path


def new_figure(panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure with `panels` axes side by side, in the style of all our pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, 1 + index) for index in range(panels)]
    for axis in axes:
        axis.grid(color="#e3e3e3", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
