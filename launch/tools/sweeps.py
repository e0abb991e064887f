"""Several runs of the pretraining job from one config: which they are, and running them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.cluster.signals import stop_requests
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.files import CONFIG, SUMMARY
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.tools.command_line import check_output

OPTIMIZERS = {name: [f"--optimizer.name={name}"] for name in SECTIONS}
"""What `--optimizers` can name, with the arguments of the job."""
SINGLE = "single"
ENGINES = {
    "fsdp2": ["--engine=fsdp2"],
    **{f"zero{n}": ["--engine=deepspeed", f"--deepspeed.stage={n}"] for n in range(4)},
    SINGLE: ["--engine=fsdp2"],
}
"""The same of `--engines`; `single` is one process."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Its optimizer or engine, and what is varied."""
    folder: Path
    arguments: tuple[str, ...]
    """Of the pretraining job, the config's path first."""
    config: Config
    """What they say."""
    processes: int


def plan(
    config: str,
    output: Path,
    processes: int,
    *,
    optimizers: Sequence[str] = (),
    engines: Sequence[str] = (),
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Trial]:
    """The runs: each optimizer or engine with each combination of the values that vary.

    Args:
        config: Path of the common config.
        output: Folder under which each run gets its own.
        processes: Of each run.
        optimizers: Names; or else
        engines: names; without either, the config's own optimizer and engine.
        vary: `KEY=VALUE,VALUE` for each key of the job that varies. A key of one optimizer varies
            its runs only.
        overrides: `--section.key value` arguments for all runs; a key of one optimizer or engine
            goes to its runs only.

    Raises:
        ConfigError: An unknown name, a malformed `vary`, or a config that cannot be run.
    """
    known = ENGINES if engines else OPTIMIZERS
    kinds = dict.fromkeys(engines or optimizers)
    for name in kinds:
        if name not in known:
            raise ConfigError(f"unknown {name!r}: name some of {', '.join(known)}")
    axes, given = dict(_axis(text) for text in vary), options.split_arguments(overrides)
    _check_keys(axes, given, optimizers, engines)
    if not kinds:
        words = [f"--{key}={text}" for key, text in given]
        kinds = {options.load(config, words).optimizer.name: None}
    trials: dict[Path, Trial] = {}
    for kind in kinds:
        if engines:
            foreign: tuple[str, ...] = () if kind.startswith("zero") else ("deepspeed.",)
        else:
            foreign = tuple(f"optimizer.{name}." for name in OPTIMIZERS if name != kind)
        words = [*(known[kind] if engines or optimizers else [])]
        words += [f"--{key}={text}" for key, text in given if not key.startswith(foreign)]
        varied = {key: texts for key, texts in axes.items() if not key.startswith(foreign)}
        for texts in product(*varied.values()):
            chosen = list(zip(varied, texts, strict=True))
            parts = [f"-{key.rpartition('.')[2]}{text}" for key, text in chosen]
            name = kind + "".join(parts).replace("/", "_")
            folder = output / name
            each = [*words, *(f"--{key}={text}" for key, text in chosen)]
            each += [f"--output={folder}", "--resume"]
            found = options.load(config, each)
            count = 1 if kind == SINGLE else processes
            trials[folder] = Trial(name, folder, (config, *each), found, count)
    return list(trials.values())


def _check_keys(
    axes: Collection[str],
    given: Sequence[tuple[str, str]],
    optimizers: Sequence[str],
    engines: Sequence[str],
) -> None:
    """Refuses keys that would say twice what a run is, or not of which optimizer."""
    if optimizers and engines:
        raise ConfigError("--engines runs one optimizer: give --optimizer.name NAME")
    own = {"output", "resume"}
    own |= {"optimizer.name"} if optimizers else set()
    own |= {"engine", "deepspeed.stage"} if engines else set()
    keys = [key for key, _ in given]
    for key in (*axes, *keys):
        if key in own or (key in axes and key in keys):
            raise ConfigError(f"--{key} differs from run to run: compare sets it itself")
        if optimizers and key.startswith("optimizer.") and key.count(".") == 1:
            raise ConfigError(f"--{key}: of which optimizer? Give --optimizer.NAME.{key[10:]}")


def _axis(text: str) -> tuple[str, list[str]]:
    """A key of the job and the values that it takes in turn."""
    key, _, values = text.partition("=")
    found = [value for value in values.split(",") if value]
    if not key or not found:
        raise ConfigError(f"--vary {text}: KEY=VALUE,VALUE is wanted")
    options.parse_arguments([f"--{key}={value}" for value in found])
    return key, found


def check(trial: Trial) -> None:
    """Makes sure that a trial can be run, or continued, in its folder.

    Raises:
        ConfigError: It is no folder, or holds a run of another configuration.
    """
    check_output(trial.folder)
    recorded = trial.folder / CONFIG
    if not recorded.exists() or recorded.read_text() == options.to_toml(trial.config):
        return
    try:
        there = options.flatten(tomllib.loads(recorded.read_text()))
    except ValueError:
        raise ConfigError(f"{recorded} is not the configuration of a run") from None
    here = options.flatten(tomllib.loads(options.to_toml(trial.config)))
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    raise ConfigError(
        f"{trial.folder} holds a run of another configuration (of another version, or with "
        f"another {', '.join(differing[:3]) or 'layout'}): give another --output"
    )


def run_trial(trial: Trial) -> bool:
    """Runs or continues a trial unless it is complete; returns whether it is now.

    Raises:
        KeyboardInterrupt: A stop was asked for; the run was told, has saved and ended.
    """
    if (trial.folder / SUMMARY).exists():
        print(f"== {trial.folder}: complete already", flush=True)
        return True
    print(f"== {trial.folder}", flush=True)
    launcher = [sys.executable]
    if trial.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", *shutdown_timeout(300)]
        launcher += [f"--nproc-per-node={trial.processes}"]
    command = [*launcher, "-m", "conda_dist.launch.pretrain", *trial.arguments]
    # Threads are shared out among the processes, as torchrun would do, without its warning.
    threads = str(max(1, (os.cpu_count() or 1) // trial.processes))
    # In a session of its own, the run hears of a stop once, from here and not from the terminal
    # as well; and by SIGTERM, which torchrun passes on to its processes.
    run = subprocess.Popen(
        command, env={"OMP_NUM_THREADS": threads, **os.environ}, start_new_session=True
    )
    with stop_requests(lambda number: run.terminate()) as stop:
        code = run.wait()
    if stop:
        raise KeyboardInterrupt
    return code == 0
