"""Several runs of the pretraining job from one config: which they are, and running them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.cluster.signals import stop_requests
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError, OptimizerName
from conda_dist.launch.job.files import CONFIG, SUMMARY
from conda_dist.launch.tools.command_line import check_output

OPTIMIZERS = get_args(OptimizerName)
REFRESH_METHODS = get_args(options.SCHEMA["optimizer.conda.refresh_method"].type)
ENGINES = {
    "fsdp2": ["--engine=fsdp2"],
    **{f"zero{n}": ["--engine=deepspeed", f"--deepspeed.stage={n}"] for n in range(4)},
    "single": ["--engine=fsdp2"],
}
"""What `--engines` can name, with the arguments of the job; `single` is one process."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Of its optimizer or engine, or of its refresh method and interval."""
    folder: Path
    arguments: tuple[str, ...]
    """Of the pretraining job, the config's path first."""
    config: Config
    """What they say."""

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.config.optimizer.chosen.lr


def _trial(name: str, folder: Path, config: str, arguments: Sequence[str]) -> Trial:
    words = [*arguments, f"--output={folder}", "--resume"]
    return Trial(name, folder, (config, *words), options.load(config, words))


def optimizer_trials(
    config: str, output: Path, names: Sequence[str], rates: Sequence[str], overrides: Sequence[str]
) -> list[Trial]:
    """A run for each optimizer, or for each of its learning rates.

    Args:
        config: Path of the common config.
        output: Folder under which each run gets its own.
        names: The optimizers, in the order of the runs.
        rates: `NAME=RATE,RATE` for each optimizer to sweep.
        overrides: `--section.key value` arguments for all runs; a key of one optimizer goes to
            its runs only.

    Raises:
        ConfigError: An unknown optimizer, a malformed rate, or a config that cannot be run.
    """
    for name in names:
        if name not in OPTIMIZERS:
            raise ConfigError(f"unknown optimizer {name!r}: {', '.join(OPTIMIZERS)}")
    sweeps: dict[str, list[float]] = {}
    for text in rates:
        name, _, listed = text.partition("=")
        try:
            sweeps[name] = [float(rate) for rate in listed.split(",")]
        except ValueError:
            raise ConfigError(f"--lr {text}: NAME=RATE,RATE is wanted") from None
        if name not in names:
            raise ConfigError(f"--lr {text}: {name!r} is not among the optimizers to run")
    given = _overrides(overrides, "optimizer.name")
    for key, _ in given:
        if key.startswith("optimizer.") and key.count(".") == 1:
            raise ConfigError(f"--{key}: of which optimizer? Give --optimizer.NAME.{key[10:]}")
    trials = []
    for name in names:
        others = tuple(f"optimizer.{other}." for other in OPTIMIZERS if other != name)
        own = [f"--{key}={text}" for key, text in given if not key.startswith(others)]
        words = [f"--optimizer.name={name}", *own]
        configured = options.load(config, words).optimizer.chosen.lr
        trials += [
            _trial(name, output / f"{name}-lr{lr:g}", config, [*words, f"--optimizer.lr={lr!r}"])
            for lr in sweeps.get(name, [configured])
        ]
    return trials


def engine_trials(
    config: str, output: Path, names: Sequence[str], overrides: Sequence[str]
) -> list[Trial]:
    """The same job on each engine; arguments as above.

    Raises:
        ConfigError: An unknown engine, or a config that one of them cannot run.
    """
    given, trials = _overrides(overrides, "engine", "deepspeed.stage"), []
    for name in dict.fromkeys(names):
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}: {', '.join(ENGINES)}")
        zero = name.startswith("zero")
        own = [f"--{key}={text}" for key, text in given if zero or not key.startswith("deepspeed.")]
        trials.append(_trial(name, output / name, config, [*ENGINES[name], *own]))
    return trials


def refresh_trials(
    config: str,
    output: Path,
    refreshes: Sequence[str],
    seeds: Sequence[str],
    overrides: Sequence[str],
) -> list[Trial]:
    """A run of Conda for each refresh method, interval and seed.

    Args:
        config: Path of the common config.
        output: Folder under which each run gets its own.
        refreshes: `METHOD=GAP,GAP` for each method.
        seeds: Of the runs of each pair.
        overrides: `--section.key value` arguments for all runs.

    Raises:
        ConfigError: A malformed or unknown method, interval or seed, or a config that cannot be
            run.
    """
    own = ("training.seed", "optimizer.name", ".refresh_method", ".update_proj_gap")
    common = [f"--{key}={text}" for key, text in _overrides(overrides, *own)]
    trials: dict[Path, Trial] = {}
    for text in refreshes:
        method, _, gaps = text.partition("=")
        if method not in REFRESH_METHODS:
            known = ", ".join(REFRESH_METHODS)
            raise ConfigError(f"--refreshes {text}: {method!r} is none of the methods {known}")
        if not all(gap.isdecimal() for gap in gaps.split(",")):
            raise ConfigError(f"--refreshes {text}: METHOD=GAP,GAP is wanted")
        for gap in gaps.split(","):
            words = [*common, "--optimizer.name=conda"]
            words += [f"--optimizer.refresh_method={method}", f"--optimizer.update_proj_gap={gap}"]
            for seed in seeds:
                folder = output / f"{method}-gap{gap}-seed{seed}"
                words_of_seed = [*words, f"--training.seed={seed}"]
                trials[folder] = _trial(f"{method}-gap{gap}", folder, config, words_of_seed)
    return list(trials.values())


def _overrides(overrides: Sequence[str], *own: str) -> list[tuple[str, str]]:
    """Keys and values for all runs; refuses those that differ from run to run."""
    given = options.split_arguments(overrides)
    for key, _ in given:
        if key in ("output", "resume") or key.endswith(own):
            raise ConfigError(f"--{key} differs from run to run: compare sets it itself")
    return given


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


def run_trial(trial: Trial, processes: int) -> bool:
    """Runs or continues a trial unless it is complete; returns whether it is now.

    Raises:
        KeyboardInterrupt: A stop was asked for; the run was told, has saved and ended.
    """
    if (trial.folder / SUMMARY).exists():
        print(f"== {trial.folder}: complete already", flush=True)
        return True
    print(f"== {trial.folder}", flush=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", *shutdown_timeout(300)]
        launcher += [f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "conda_dist.launch.pretrain", *trial.arguments]
    # Threads are shared out among the processes, as torchrun would do, without its warning.
    threads = str(max(1, (os.cpu_count() or 1) // processes))
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
