"""Layer: launch. How often to refresh the bases, and by which method: the loss of every pair.

    python -m conda_dist.launch.intervals CONFIG --output DIR --seeds 0,1,2 \\
        --refreshes svd=5,20,100 --refreshes orthogonal_iteration=1,5,20,100

Each method runs at each interval (`update_proj_gap`) with each seed; the table and the picture
have the final validation loss beside the optimizer's time. Runs go one after another through the
pretraining job. Those already complete in DIR are kept, so that a study can be stopped, continued
and extended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conda_dist.launch.compare import Trial, parser_of_runs, run_trial, set_by
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.picture import new_figure
from conda_dist.launch.pretrain import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED
from conda_dist.launch.tools.comparison import read_outcome
from conda_dist.options import REFRESH_METHODS

_COLOURS = {"svd": "#1f5a94", "orthogonal_iteration": "#c8501e", "eigh64": "#3d8b4f"}
_SET_HERE = ("output", "resume", "training.seed", "optimizer.name")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then draws and tabulates; returns the exit code."""
    try:
        given, overrides = _parser().parse_known_args(arguments)
        trials = plan(given.config, given.output, given.refreshes, given.seeds, overrides)
        every = [trial for group in trials.values() for trial in group]
        failed = [trial for trial in every if not run_trial(trial, given.nproc)]
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    pairs = [
        read_pair(method, gap, [trial.folder for trial in group])
        for (method, gap), group in trials.items()
        if not set(failed) & set(group)
    ]
    if pairs:
        print(write_tables(pairs, given.output), f"in {draw(pairs, given.output)}", sep="\n")
    for trial in failed:
        print(f"failed: {trial.folder} (its messages are above)", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def plan(
    config: str,
    output: Path,
    refreshes: Sequence[str],
    seeds: Sequence[str],
    overrides: list[str],
) -> dict[tuple[str, int], tuple[Trial, ...]]:
    """The runs that a study consists of.

    Args:
        config: Path of the common config.
        output: Folder under which each run gets its own.
        refreshes: `METHOD=GAP,GAP` for each method.
        seeds: Of the runs of each pair.
        overrides: `--section.key value` arguments for all runs.

    Returns:
        By method and interval the runs, one for each seed.

    Raises:
        ConfigError: A malformed or unknown method, interval or seed, or a config that cannot be
            run.
    """
    common = ["--optimizer.name", "conda"]
    for key, text in options.split_arguments(overrides):
        if key in _SET_HERE or key.endswith((".refresh_method", ".update_proj_gap")):
            raise set_by("intervals", key)
        common.append(f"--{key}={text}")
    trials = {}
    for method, gap in _parse(refreshes):
        own = [*common, f"--optimizer.conda.refresh_method={method}"]
        own.append(f"--optimizer.conda.update_proj_gap={gap}")
        group = []
        for seed in seeds:
            folder = output / f"{method}-gap{gap}-seed{seed}"
            words = [*own, f"--training.seed={seed}", "--output", str(folder), "--resume"]
            lr = options.load(config, words).optimizer.chosen.lr
            group.append(Trial(method, lr, folder, (config, *words)))
        trials[method, gap] = tuple(group)
    return trials


def _parse(refreshes: Sequence[str]) -> list[tuple[str, int]]:
    pairs = []
    for text in refreshes:
        method, _, gaps = text.partition("=")
        if method not in REFRESH_METHODS:
            known = ", ".join(REFRESH_METHODS)
            raise ConfigError(f"--refreshes {text}: {method!r} is none of the methods {known}")
        if not all(gap.isdecimal() for gap in gaps.split(",")):
            raise ConfigError(f"--refreshes {text}: METHOD=GAP,GAP is wanted")
        pairs += [(method, int(gap)) for gap in gaps.split(",")]
    return list(dict.fromkeys(pairs))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_runs("intervals", __doc__, nproc=1)
    parser.add_argument(
        "--refreshes",
        action="append",
        required=True,
        metavar="METHOD=GAP,...",
        help=f"intervals to try a method at ({', '.join(REFRESH_METHODS)}); may be repeated",
    )
    parser.add_argument(
        "--seeds", type=lambda text: text.split(","), default=["0"], metavar="SEED,..."
    )
    return parser


def read_pair(method: str, gap: int, folders: Sequence[Path]) -> Pair:
    """Reads what the complete runs of a pair have left in their folders."""
    outcomes = [read_outcome(folder, method, 0.0) for folder in folders]
    losses = tuple(outcome.final.val_loss for outcome in outcomes)
    return Pair(method, gap, losses, statistics.median(each.optimizer_s for each in outcomes))


def write_tables(pairs: Sequence[Pair], folder: Path) -> str:
    """Writes intervals.json and intervals.md, lowest loss first, and returns the latter's text."""
    lines = ["| method | interval | final validation loss | mean | optimizer ms/step |"]
    lines.append("|---" * 5 + "|")
    for pair in sorted(pairs, key=lambda pair: pair.mean):
        losses = ", ".join(f"{loss:.3f}" for loss in pair.val_losses)
        time = f"{1000 * pair.optimizer_s:.1f}"
        lines.append(f"| {pair.method} | {pair.gap} | {losses} | {pair.mean:.3f} | {time} |")
    text = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    listed = json.dumps([asdict(pair) for pair in pairs], indent=1)
    (folder / "intervals.json").write_text(listed + "\n")
    (folder / "intervals.md").write_text(text)
    return text


def draw(pairs: Sequence[Pair], folder: Path) -> Path:
    """Draws the final losses against the interval and against the optimizer's time."""
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
    path = folder / "intervals.png"
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    sys.exit(main())
