"""Compares optimizers at rates tuned by the same means, and keeps what is needed to run it again.

    python -m conda_dist.launch.compare CONFIG --optimizers conda,muon,adamw --output DIR
    python -m conda_dist.launch.compare --output DIR [--optimizers namo] [--seeds 5] [--budget 12]
    python -m conda_dist.launch.compare --output DIR --draw

For each optimizer it looks for the two rates, those of the matrices and of everything else, within
the same budget of trials, by factors of two on one seed; the search begins at the config's own. At
the best rates there are runs on other seeds. Rules that beat another one get shorter runs as well,
which say after how many steps they have its final loss. A run that diverges is a result.

The second form continues what was stopped or killed, or adds rules, trials or seeds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.files import EXIT_FAILED, EXIT_STOPPED
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.tools import protocol
from conda_dist.launch.tools.command_line import Parser, count, positive, refuse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then draws and tabulates; returns the exit code."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    given, overrides = parse(typed)
    try:
        if given.draw:
            asked = given.config, given.optimizers, given.budget, given.seeds, given.nproc
            if any(value is not None for value in asked) or overrides:
                raise ConfigError("--draw runs nothing: give --output alone")
            code = 0
        else:
            code = run(protocol.plan(given, overrides, typed))
        if code != EXIT_STOPPED:
            from conda_dist.launch.tools.comparison import show

            print(*show(given.output), sep="\n")
    except ConfigError as error:
        return refuse(error)
    return code


def run(comparison: protocol.Comparison) -> int:
    """Runs what is missing; returns the exit code."""
    from conda_dist.launch.tools.trials import Runner

    comparison.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(comparison.folder / "lock", timeout=5):
            runner = Runner(comparison)
            if not runner.run():
                print("stopped; the same command continues", file=sys.stderr)
                return EXIT_STOPPED
    except Timeout:
        raise ConfigError(f"another comparison writes {comparison.folder}") from None
    for failed, said in runner.failed.items():
        print(f"failed: {failed.name}: {said}", file=sys.stderr)
    return EXIT_FAILED if runner.failed else 0


def parse(typed: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those of the job."""
    epilog = "Any --section.key of the pretraining job may follow; it applies to every run."
    parser = Parser("compare", __doc__, epilog)
    parser.usage = "%(prog)s [CONFIG] --output DIR ..."
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    seeds: dict[str, Any] = {"type": count, "metavar": "N"}
    listed: dict[str, Any] = {"type": _rules, "metavar": "NAME,..."}
    names = ", ".join(SECTIONS)
    for name, text, options in (
        ("--output", "folder of the comparison", {"type": Path, "required": True}),
        ("--optimizers", f"{names} (default: all)", listed),
        ("--budget", "trials for each of these (default 8)", number),
        (
            "--seeds",
            "seeds for every rule, besides the one tuned on (default 3); 0: none for these",
            seeds,
        ),
        ("--nproc", "processes per run (default 1)", number),
        ("--jobs", "runs at once (default 1)", {**number, "default": 1}),
        ("--draw", "run nothing, only write table and picture again", {"action": "store_true"}),
    ):
        parser.add_argument(name, help=text, **options)
    # It comes first, as in the job: argparse would take any key's value for it.
    named = bool(typed) and not typed[0].startswith("-")
    given, overrides = parser.parse_known_args(typed[named:])
    given.config = typed[0] if named else None
    return given, overrides


def _rules(text: str) -> list[str]:
    """The rules in a list such as "muon, conda+betas=0.8,0.9", without blanks."""
    # A comma that a number follows is within a value.
    return ["".join(rule.split()) for rule in re.split(r",(?!\s*[\d.])", text)]


if __name__ == "__main__":
    raise SystemExit(main())
