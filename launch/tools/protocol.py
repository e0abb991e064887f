"""What a comparison's command line asks for: checked, with nothing written."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import time
import tomllib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.files import CONFIG
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.tools.command_line import check_input, check_output
from conda_dist.launch.tools.search import Protocol, Rule, Run

RESULTS = "results.json"
_DEFAULTS = {"budget": 8, "seeds": 3}
_PACKAGES = ("conda-dist", "torch", "numpy", "transformers", "tokenizers", "deepspeed", "optuna")
_INCIDENTAL = ("output", "resume", "optimizer.name", "data.cache")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs of a comparison, and how to start them."""

    folder: Path
    config: Config
    """What all runs have in common."""
    protocol: Protocol
    jobs: int
    """Runs at once."""
    results: dict[str, Any]
    """What `results.json` holds: the common `config`, `nproc` processes of each run, `rules`,
    `sessions` (commands typed, with versions and machine) and a record of each of the `runs`."""

    def command(self, run: Run) -> list[str]:
        """Starts that run, or continues it."""
        optimizer = replaced(self.config, {"optimizer.name": run.rule}).optimizer
        rates = optimizer.keys_for_rates(run.matrices, run.rest)
        keys = {"optimizer.name": run.rule, **rates, "training.seed": run.seed}
        keys |= {"training.steps": run.steps, "output": self.folder / "runs" / run.name}
        words = ["python"]
        if (processes := self.results["nproc"]) > 1:
            words += ["-m", "torch.distributed.run", "--standalone", *shutdown_timeout(300)]
            words += [f"--nproc-per-node={processes}"]
        words += ["-m", "conda_dist.launch.pretrain", str(self.folder / CONFIG)]
        return [*words, *(f"--{key}={value}" for key, value in keys.items()), "--resume"]


def replaced(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of some keys; raises ConfigError if it cannot be run."""
    return options.build(options.to_values(config) | values)


def protocol_of(results: dict[str, Any]) -> Protocol:
    """The runs that a comparison consists of."""
    rules = tuple(Rule(**rule) for rule in results["rules"])
    config = results["config"]
    return Protocol(rules, config["training.seed"], config["training.steps"])


def read(folder: Path) -> dict[str, Any]:
    """The results of the comparison in that folder.

    Raises:
        ConfigError: There are none, or they cannot be read.
    """
    file = folder / RESULTS
    try:
        results: dict[str, Any] = json.loads(file.read_text())
        protocol_of(results)
        _ = results["nproc"], results["sessions"], results["runs"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{file} is not there, or not the results of a comparison") from None
    return results


def plan(given: argparse.Namespace, overrides: Sequence[str], typed: Sequence[str]) -> Comparison:
    """Finds what there is to run.

    Args:
        given: `config`, `output`, `optimizers`, `budget`, `seeds`, `nproc`, `jobs`; what is None
            stays as it is in the comparison that the output holds, or takes its default.
        overrides: `--section.key value` arguments for all runs.
        typed: All arguments, for the record.

    Raises:
        ConfigError: An unknown name or key, a config that cannot be run, or an output that cannot
            be written or holds a comparison of another configuration.
    """
    folder: Path = given.output
    check_output(folder)
    there = read(folder) if (folder / RESULTS).exists() else None
    if there is None and given.config is None:
        raise ConfigError(f"{folder} holds no comparison yet: name a CONFIG")
    before = {rule["name"]: rule for rule in there["rules"]} if there else {}
    asked = given.optimizers or before or SECTIONS
    for name in asked:
        if name not in SECTIONS:
            raise ConfigError(f"unknown {name!r}: name some of {', '.join(SECTIONS)}")
    names = list(dict.fromkeys([*before, *asked]))
    config = _common(given.config or str(folder / CONFIG), overrides, names)
    nproc = given.nproc or (there["nproc"] if there else 1)
    if there:
        _require_same(folder, there, config, nproc)
    rules = []
    for name in names:
        amounts = {key: before.get(name, _DEFAULTS)[key] for key in _DEFAULTS}
        if name in asked:
            amounts |= {key: getattr(given, key) or amounts[key] for key in amounts}
        rates = replaced(config, {"optimizer.name": name}).optimizer.effective_rates
        rules.append({"name": name, "matrices": rates[0], "rest": rates[1], **amounts})
    if (gpus := devices()) and given.jobs * nproc > len(gpus):
        raise ConfigError(f"--jobs {given.jobs} of {nproc} processes: there are {len(gpus)} GPUs")
    results = {
        "config": _flat(config),
        "nproc": nproc,
        "rules": rules,
        "sessions": [*(there["sessions"] if there else []), _session(given.jobs, typed)],
        "runs": there["runs"] if there else [],
    }
    protocol = protocol_of(results)
    for name in names:  # also of the shortest runs, before any is begun
        for steps in protocol.lengths:
            replaced(config, {"optimizer.name": name, "training.steps": steps})
    check_input(config)
    return Comparison(folder, config, protocol, given.jobs, results)


def _common(path: str, overrides: Sequence[str], rules: Collection[str]) -> Config:
    """What all runs have in common, with the sections of all optimizers."""
    own: dict[str, list[str]] = {name: [] for name in SECTIONS}
    general: list[str] = []
    for key, text in options.split_arguments(overrides):
        parts = key.split(".")
        if key in ("output", "resume", "optimizer.name"):
            raise ConfigError(f"--{key} differs from run to run: compare sets it itself")
        if parts[0] == "optimizer" and len(parts) == 2 and key not in options.SCHEMA:
            raise ConfigError(f"--{key}: of which optimizer? Give --optimizer.NAME.{parts[1]}")
        section = parts[1] if parts[0] == "optimizer" and len(parts) == 3 else ""
        if section in own and section not in rules:
            raise ConfigError(f"--{key} has no effect: {section} is not compared")
        own.get(section, general).append(f"--{key}={text}")
    values = options.to_values(options.load(path, general))
    for name, words in own.items():
        found = options.to_values(options.load(path, [f"--optimizer.name={name}", *words]))
        values |= {k: v for k, v in found.items() if k.startswith(f"optimizer.{name}.")}
    if values["schedule.min_lr"] is not None:
        raise ConfigError("schedule.min_lr is one rate for all: give schedule.min_lr_ratio instead")
    return options.build(values)


def _require_same(folder: Path, there: dict[str, Any], config: Config, nproc: int) -> None:
    """Refuses to add runs of another configuration; of optimizers, only those there count."""
    now, then = ({**_flat(config), "nproc": nproc}, {**there["config"], "nproc": there["nproc"]})
    compared = [rule["name"] for rule in there["rules"]]
    free = tuple(f"optimizer.{name}." for name in SECTIONS if name not in compared)
    differing = [
        key
        for key in {**then, **now}
        if then.get(key) != now.get(key) and key not in _INCIDENTAL and not key.startswith(free)
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds a comparison of another configuration (of another version, or with "
            f"another {', '.join(differing[:3])}): give another --output"
        )


def _flat(config: Config) -> dict[str, Any]:
    return options.flatten(tomllib.loads(options.to_toml(config)))


def _session(jobs: int, typed: Sequence[str]) -> dict[str, Any]:
    """When, where and with what the runs of one command were made."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", "-m", "conda_dist.launch.compare", *typed]),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {len(devices())} GPUs",
        "jobs": jobs,
        "versions": versions,
    }


def devices() -> list[str]:
    """The GPUs that runs may take, as CUDA_VISIBLE_DEVICES names them; none: they use the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
