"""Layer: launch. Several optimizers, or engines, on one config and the same data, in one picture.

    python -m conda_dist.launch.compare CONFIG --optimizers conda,adamw,muon --output DIR
    python -m conda_dist.launch.compare CONFIG --engines fsdp2,zero1,zero2,zero3,single --output DIR

Each optimizer runs with its own settings from the config's [optimizer.NAME]; `--lr` makes a small
sweep of it, of which the best run by final validation loss is drawn. Engines run the config's
optimizer; how far apart their losses are is tabulated. Runs go one after another through the same
pretraining job. Those already complete in DIR are kept, so that a comparison can be stopped,
continued and extended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from conda_dist.launch.cluster.signals import stop_requests
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError, OptimizerName
from conda_dist.launch.job.report import SUMMARY
from conda_dist.launch.pretrain import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, RESOLVED_CONFIG
from conda_dist.launch.tools.comparison import Outcome, draw, read_outcome, write_tables
from conda_dist.launch.tools.curves import draw_curves, read_curve, write_distances

ENGINES = {
    "fsdp2": ["--engine", "fsdp2"],
    **{
        f"zero{stage}": ["--engine", "deepspeed", "--deepspeed.stage", str(stage)]
        for stage in range(4)
    },
    "single": ["--engine", "fsdp2"],
}
"""What `--engines` can name, with the arguments of the job; `single` is one process."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the comparison."""

    name: str
    """Of its optimizer, or engine."""
    lr: float
    folder: Path
    arguments: tuple[str, ...]
    """Of the pretraining job, the config's path first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then draws and tabulates; returns the exit code."""
    try:
        given, overrides = _parser().parse_known_args(arguments)
        if given.engines:
            if given.optimizers or given.lr:
                raise ConfigError("--engines runs one optimizer: give --optimizer.name NAME")
            trials = plan_engines(given.config, given.output, given.engines, overrides)
        else:
            names = given.optimizers or list(get_args(OptimizerName))
            trials = plan(given.config, given.output, names, given.lr, overrides)
        processes = {trial.name: 1 if trial.name == "single" else given.nproc for trial in trials}
        failed = [trial for trial in trials if not run_trial(trial, processes[trial.name])]
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    complete = [trial for trial in trials if trial not in failed]
    if given.engines and len(complete) > 1:
        curves = [read_curve(trial.folder, trial.name) for trial in complete]
        print(write_distances(curves, given.output), f"in {draw_curves(curves, given.output)}")
    elif complete and not given.engines:
        _show([read_outcome(each.folder, each.name, each.lr) for each in complete], given.output)
    for trial in failed:
        print(f"failed: {trial.folder} (its messages are above)", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def plan(
    config: str, output: Path, optimizers: Sequence[str], rates: Sequence[str], overrides: list[str]
) -> list[Trial]:
    """The runs that a comparison consists of.

    Args:
        config: Path of the common config.
        output: Folder under which each run gets its own.
        optimizers: Names, in the order of the runs.
        rates: `NAME=RATE,RATE` for each optimizer to sweep.
        overrides: `--section.key value` arguments for all runs; a key of one optimizer goes to
            its runs only.

    Raises:
        ConfigError: An unknown optimizer, a malformed rate, or a config that cannot be run.
    """
    for name in optimizers:
        if name not in get_args(OptimizerName):
            raise ConfigError(f"unknown optimizer {name!r}: {', '.join(get_args(OptimizerName))}")
    sweeps = _parse_rates(rates, optimizers)
    trials = []
    for name in optimizers:
        common = [config, "--optimizer.name", name, *_overrides_for(name, overrides)]
        configured = options.load(config, common[1:]).optimizer.chosen.lr
        for lr in sweeps.get(name, [configured]):
            folder = output / f"{name}-lr{lr:g}"
            own = ["--optimizer.lr", repr(lr), "--output", str(folder), "--resume"]
            trials.append(Trial(name, lr, folder, (*common, *own)))
    return trials


def plan_engines(
    config: str, output: Path, engines: Sequence[str], overrides: list[str]
) -> list[Trial]:
    """The same job on each engine; arguments as for `plan`.

    Raises:
        ConfigError: An unknown engine, or a config that one of them cannot run.
    """
    trials = []
    for name in dict.fromkeys(engines):
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}: {', '.join(ENGINES)}")
        arguments = [config, *ENGINES[name]]
        for key, text in options.split_arguments(overrides):
            if key in ("output", "resume", "engine", "deepspeed.stage"):
                raise set_by("compare", key)
            if not key.startswith("deepspeed.") or name.startswith("zero"):
                arguments.append(f"--{key}={text}")
        lr = options.load(config, arguments[1:]).optimizer.chosen.lr
        folder = output / name
        own = ("--output", str(folder), "--resume")
        trials.append(Trial(name, lr, folder, (*arguments, *own)))
    return trials


def set_by(command: str, key: str) -> ConfigError:
    """The error for a key of the job that a command gives each of its runs."""
    return ConfigError(f"--{key} differs from run to run: {command} sets it itself")


def parser_of_runs(command: str, description: str | None, nproc: int) -> argparse.ArgumentParser:
    """The command line of a command that makes several runs from one config.

    Args:
        command: its name.
        description: what it does.
        nproc: processes per run unless told.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m conda_dist.launch.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any --section.key of the pretraining job may follow; it applies to every run.",
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file shared by all runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    text = f"processes per run (default {nproc})"
    parser.add_argument("--nproc", type=int, default=nproc, help=text)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_runs("compare", __doc__, nproc=2)
    names = ",".join(get_args(OptimizerName))
    listed: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--optimizers", help=f"{names} (default: all of them)", **listed)
    parser.add_argument("--engines", help=f"instead: {','.join(ENGINES)}", **listed)
    parser.add_argument(
        "--lr",
        action="append",
        default=[],
        metavar="NAME=RATE,...",
        help="learning rates to try for an optimizer; may be repeated",
    )
    return parser


def _parse_rates(rates: Sequence[str], optimizers: Sequence[str]) -> dict[str, list[float]]:
    sweeps: dict[str, list[float]] = {}
    for text in rates:
        name, _, listed = text.partition("=")
        try:
            sweeps[name] = [float(rate) for rate in listed.split(",")]
        except ValueError:
            raise ConfigError(f"--lr {text}: NAME=RATE,RATE is wanted") from None
        if name not in optimizers:
            raise ConfigError(f"--lr {text}: {name!r} is not among the optimizers to run")
    return sweeps


def _overrides_for(optimizer: str, overrides: list[str]) -> list[str]:
    """The overrides without keys of other optimizers."""
    kept: list[str] = []
    for name, text in options.split_arguments(overrides):
        parts = name.split(".")
        if parts[0] in ("output", "resume") or parts[:2] == ["optimizer", "name"]:
            raise set_by("compare", name)
        if parts[0] == "optimizer" and len(parts) == 2:
            raise ConfigError(f"--{name}: of which optimizer? Give --optimizer.NAME.{parts[1]}")
        if parts[0] != "optimizer" or parts[1] == optimizer:
            kept.append(f"--{name}={text}")
    return kept


def run_trial(trial: Trial, processes: int) -> bool:
    """Runs or continues a trial unless it is complete; returns whether it is now.

    Raises:
        ConfigError: Its folder holds a run of another configuration.
        KeyboardInterrupt: A stop was asked for; the run was told, has saved and ended.
    """
    config = options.load(trial.arguments[0], trial.arguments[1:])
    recorded = trial.folder / RESOLVED_CONFIG
    if recorded.exists() and recorded.read_text() != options.to_toml(config):
        raise ConfigError(
            f"{trial.folder} holds a run of another configuration: give another --output"
        )
    if (trial.folder / SUMMARY).exists():
        print(f"== {trial.folder}: complete already", flush=True)
        return True
    print(f"== {trial.folder}", flush=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=300"]
        launcher += [f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "conda_dist.launch.pretrain", *trial.arguments]
    # In a session of its own, the run hears of a stop once, from here and not from the terminal
    # as well; and by SIGTERM, which torchrun passes on to its processes.
    run = subprocess.Popen(command, env=_environment(processes), start_new_session=True)
    with stop_requests(lambda number: run.terminate()) as stop:
        code = run.wait()
    if stop:
        raise KeyboardInterrupt
    return code == 0


def _environment(processes: int) -> dict[str, str]:
    """Threads shared out among the processes, as torchrun would do, without its warning."""
    share = max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _show(outcomes: list[Outcome], output: Path) -> None:
    table = write_tables(outcomes, output)
    print(table, f"curves in {draw(outcomes, output)}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
