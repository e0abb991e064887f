"""Several runs of one config on the same data, in one table and one picture.

    python -m conda_dist.launch.compare CONFIG --optimizers conda,adamw,muon --output DIR
    python -m conda_dist.launch.compare CONFIG --engines fsdp2,zero1,zero2,zero3,single --output DIR
    python -m conda_dist.launch.compare CONFIG --refreshes svd=5,20 --seeds 0,1,2 --output DIR

Each optimizer runs with its own settings from the config's [optimizer.NAME]; `--lr` makes a small
sweep of it, of which the best run by final validation loss is drawn. Engines run the config's
optimizer; how far apart their losses are is tabulated. `--refreshes` runs Conda with each refresh
method at each interval (`update_proj_gap`) and seed. Runs go one after another through the same
pretraining job. Those already complete in DIR are kept, so that a comparison can be stopped,
continued and extended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.files import EXIT_FAILED, EXIT_STOPPED
from conda_dist.launch.tools import comparison
from conda_dist.launch.tools.command_line import Parser, positive, refuse
from conda_dist.launch.tools.sweeps import (
    ENGINES,
    OPTIMIZERS,
    REFRESH_METHODS,
    Trial,
    check,
    engine_trials,
    optimizer_trials,
    refresh_trials,
    run_trial,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then draws and tabulates; returns the exit code."""
    given, overrides = _parser().parse_known_args(arguments)
    nproc = given.nproc or (1 if given.refreshes else 2)
    try:
        trials = plan(given, overrides)
        for trial in trials:
            check(trial)
        processes = {trial.folder: 1 if trial.name == "single" else nproc for trial in trials}
        complete = [trial for trial in trials if run_trial(trial, processes[trial.folder])]
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    except ConfigError as error:
        return refuse(error)
    if given.engines and len(complete) > 1:
        print(*comparison.show_engines(complete, given.output), sep="\n")
    elif given.refreshes and complete:
        print(*comparison.show_refreshes(complete, given.output), sep="\n")
    elif complete and not given.engines:
        print(*comparison.show_optimizers(complete, given.output), sep="\n")
    for trial in trials:
        if trial not in complete:
            print(f"failed: {trial.folder} (its messages are above)", file=sys.stderr)
    return 0 if len(complete) == len(trials) else EXIT_FAILED


def plan(given: Any, overrides: Sequence[str]) -> list[Trial]:
    """The runs that the command line asks for.

    Raises:
        ConfigError: It asks for two kinds of comparison, or for runs that cannot be.
    """
    if given.engines and (given.optimizers or given.lr):
        raise ConfigError("--engines runs one optimizer: give --optimizer.name NAME")
    if given.refreshes and (given.engines or given.optimizers or given.lr):
        raise ConfigError("--refreshes runs Conda on one engine: leave the others out")
    if given.seeds and not given.refreshes:
        raise ConfigError("--seeds is for --refreshes: give --training.seed")
    job = given.config, given.output
    if given.engines:
        return engine_trials(*job, given.engines, overrides)
    if given.refreshes:
        return refresh_trials(*job, given.refreshes, given.seeds or ["0"], overrides)
    return optimizer_trials(*job, given.optimizers or OPTIMIZERS, given.lr, overrides)


def _parser() -> Parser:
    epilog = "Any --section.key of the pretraining job may follow; it applies to every run."
    parser = Parser("compare", __doc__, epilog)
    listed: dict[str, Any] = {"type": lambda text: text.split(",")}
    many: dict[str, Any] = {"action": "append", "default": []}
    names, engines, methods = map(", ".join, (OPTIMIZERS, ENGINES, REFRESH_METHODS))
    for name, text, options in (
        ("config", "TOML file shared by all runs", {"metavar": "CONFIG"}),
        ("--output", "folder of all runs", {"type": Path, "required": True}),
        ("--nproc", "processes per run (default 2; 1 of --refreshes)", {"type": positive}),
        ("--optimizers", f"{names} (default: all)", {"metavar": "NAME,...", **listed}),
        ("--lr", "learning rates of an optimizer", {"metavar": "NAME=RATE,...", **many}),
        ("--engines", f"instead: {engines}", {"metavar": "NAME,...", **listed}),
        ("--refreshes", f"instead: intervals of {methods}", {"metavar": "NAME=GAP,...", **many}),
        ("--seeds", "of --refreshes (default: 0)", {"metavar": "SEED,...", **listed}),
    ):
        parser.add_argument(name, help=text, **options)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
