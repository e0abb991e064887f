"""Several runs of one config on the same data, in one table and one picture.

    python -m conda_dist.launch.compare CONFIG --optimizers conda,adamw,muon --output DIR
    python -m conda_dist.launch.compare CONFIG --engines fsdp2,zero1,zero2,zero3,single --output DIR
    python -m conda_dist.launch.compare CONFIG --vary training.seed=0,1,2 \\
        --vary optimizer.conda.update_proj_gap=5,20,100 --output DIR

There is a run for each optimizer (with its own settings from the config's [optimizer.NAME]) or
engine, and for each combination of the values that `--vary` lists. Runs go one after another in
the same pretraining job. Those already complete in DIR are kept, so that a comparison can be
stopped, continued and extended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.files import EXIT_FAILED, EXIT_STOPPED
from conda_dist.launch.tools.command_line import Parser, positive, refuse
from conda_dist.launch.tools.sweeps import ENGINES, OPTIMIZERS, check, plan, run_trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then draws and tabulates; returns the exit code."""
    given, overrides = _parser().parse_known_args(arguments)
    optimizers = given.optimizers or ([] if given.engines or given.vary else [*OPTIMIZERS])
    try:
        trials = plan(
            given.config,
            given.output,
            given.nproc,
            optimizers=optimizers,
            engines=given.engines,
            vary=given.vary,
            overrides=overrides,
        )
        for trial in trials:
            check(trial)
        complete = [trial for trial in trials if run_trial(trial)]
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    except ConfigError as error:
        return refuse(error)
    if complete:
        from conda_dist.launch.tools import comparison

        print(*comparison.show(complete, given.output), sep="\n")
    for trial in trials:
        if trial not in complete:
            print(f"failed: {trial.folder} (its messages are above)", file=sys.stderr)
    return 0 if len(complete) == len(trials) else EXIT_FAILED


def _parser() -> Parser:
    epilog = "Any --section.key of the pretraining job may follow; it applies to every run."
    parser = Parser("compare", __doc__, epilog)
    listed: dict[str, Any] = {"type": lambda text: text.split(","), "default": []}
    many: dict[str, Any] = {"action": "append", "default": []}
    names, engines = map(", ".join, (OPTIMIZERS, ENGINES))
    for name, text, options in (
        ("config", "TOML file shared by all runs", {"metavar": "CONFIG"}),
        ("--output", "folder of all runs", {"type": Path, "required": True}),
        ("--nproc", "processes per run (default 2)", {"type": positive, "default": 2}),
        ("--optimizers", f"{names} (default: all)", {"metavar": "NAME,...", **listed}),
        ("--engines", f"instead: {engines}", {"metavar": "NAME,...", **listed}),
        ("--vary", "values of a key of the job", {"metavar": "KEY=VALUE,...", **many}),
    ):
        parser.add_argument(name, help=text, **options)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
