"""What a comparison's command line asks for: checked, with nothing written."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge, Interval, Len
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.files import CONFIG
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.job.section import Count, Size
from conda_dist.launch.tools.command_line import check_input, check_output
from conda_dist.launch.tools.search import Protocol, Rule, Run

RESULTS = "results.json"
BUDGET, SEEDS = 8, 3
"""What is taken for `--budget` and `--seeds`, unless the comparison has others."""
SHARED = ("weight_decay", "grad_clip")
"""Keys of every optimizer that are not tuned."""
_PACKAGES = ("conda-dist", "torch", "numpy", "transformers", "tokenizers", "deepspeed")
_INCIDENTAL = ("output", "resume", "optimizer.name", "data.cache")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs of a comparison, and how to start them."""

    folder: Path
    config: Config  # what all runs have in common
    protocol: Protocol
    jobs: int  # runs at once
    # What `results.json` holds: the common `config`, `nproc` processes of each run, `rules`,
    # `sessions` (commands typed, with versions and machine) and a record of each of the `runs`.
    results: dict[str, Any]

    def command(self, run: Run) -> list[str]:
        """Starts that run, or continues it."""
        own = keys_of(run.rule)
        rates = options.replaced(self.config, own).optimizer.keys_for_rates(run.matrices, run.rest)
        keys = {**own, **rates, "training.seed": run.seed, "training.steps": run.steps}
        keys["output"] = self.folder / "runs" / run.name
        words = ["python"]
        if (processes := self.results["nproc"]) > 1:
            words += ["-m", "torch.distributed.run", "--standalone", *shutdown_timeout(300)]
            words += [f"--nproc-per-node={processes}"]
        words += ["-m", "conda_dist.launch.pretrain", str(self.folder / CONFIG)]
        words += [f"--{key}={'none' if value is None else value}" for key, value in keys.items()]
        return [*words, "--resume"]


def parts_of(rule: str) -> list[str]:
    """The parts of NAME+KEY=VALUE+KEY=VALUE. A plus that a digit follows is an exponent's."""
    return re.split(r"\+(?!\d)", rule)


def keys_of(rule: str) -> dict[str, Any]:
    """The keys that a rule sets: NAME, or NAME+KEY=VALUE, with options of its own."""
    name, *own = parts_of(rule)
    if name not in SECTIONS:
        raise ConfigError(f"unknown {name!r}: name some of {', '.join(SECTIONS)}")
    words = [f"--optimizer.{name}.{text}" for text in own]
    return {"optimizer.name": name, **options.parse_arguments(words)}


def protocol_of(results: dict[str, Any]) -> Protocol:
    """The runs that a comparison consists of."""
    rules = tuple(Rule(**rule) for rule in results["rules"])
    config = results["config"]
    return Protocol(rules, config["training.seed"], config["training.steps"])


class _Part(BaseModel):
    """Of `results.json`, what is read of it: a table needs no more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


_Value = Annotated[float, Interval(ge=1e-100, le=1e100)]
"""A rate or a loss: two of them may be divided by each other."""


class _Rule(_Part):
    model_config = ConfigDict(extra="forbid")

    name: str
    matrices: _Value
    rest: _Value
    budget: Size
    seeds: Count


class _Session(_Part):
    command: str
    begun: str
    machine: str
    jobs: Size
    versions: dict[str, str]


class _Record(_Part):
    rule: str
    matrices: _Value
    rest: _Value
    seed: Annotated[int, Ge(0)]
    steps: Size
    val_loss: _Value | None
    state_bytes: int | None
    data: str | None
    step_s: float
    optimizer_s: float
    wall_s: float
    curve: list[Annotated[list[float], Len(2, 2)]]
    session: Count

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.val_loss is not None and [point[0] for point in self.curve][-1:] != [self.steps]:
            raise ValueError(f"its curve does not end at step {self.steps}")
        return self


class _Results(_Part):
    config: dict[str, Any]
    nproc: Size
    rules: list[_Rule]
    sessions: Annotated[list[_Session], Len(1)]
    runs: list[_Record]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for index, run in enumerate(self.runs):
            if run.session >= len(self.sessions):
                raise ValueError(f"runs.{index}.session: there is no session {run.session}")
        names = {keys_of(rule.name)["optimizer.name"] for rule in self.rules}
        keys = [f"optimizer.{name}.{key}" for name in sorted(names) for key in SHARED]
        for key in ("training.seed", "training.steps", *keys):
            if key not in self.config:
                raise ValueError(f"config has no {key}")
            options.check(key, self.config[key])
        return self


def read(folder: Path) -> dict[str, Any]:
    """The results of the comparison in that folder.

    Raises:
        ConfigError: There are none, or something in them is missing or wrong: the first is named.
    """
    file = folder / RESULTS
    try:
        results: dict[str, Any] = json.loads(file.read_text())
        _Results.model_validate(results)
    except ValidationError as error:
        found = error.errors()[0]
        reason = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        where = ".".join(map(str, found["loc"])) or "altogether"
        raise ConfigError(f"{file} is damaged: {where}: {reason}") from None
    except (OSError, ValueError):
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
    if given.config is None and not (folder / RESULTS).exists():
        raise ConfigError(f"{folder} holds no comparison yet: name a CONFIG")
    there: dict[str, Any] = {"rules": [], "sessions": [], "runs": []}
    if (folder / RESULTS).exists():
        there = read(folder)
    before = {rule["name"]: rule for rule in there["rules"]}
    asked = given.optimizers or before or SECTIONS
    names = list(dict.fromkeys([*before, *asked]))
    keys = {name: keys_of(name) for name in names}
    optimizers = {key["optimizer.name"] for key in keys.values()}
    config = _common(given.config or str(folder / CONFIG), overrides, optimizers)
    nproc = given.nproc or there.get("nproc", 1)
    rules = []
    # Means are compared only over the same seeds: all rules have as many, or none.
    seeds = given.seeds or max((rule["seeds"] for rule in before.values()), default=0) or SEEDS
    for name in names:
        then = before.get(name, {"budget": BUDGET, "seeds": seeds})
        budget = given.budget or then["budget"] if name in asked else then["budget"]
        without = then["seeds"] == 0
        if name in asked and given.seeds is not None:
            without = given.seeds == 0
        matrices, rest = options.replaced(config, keys[name]).optimizer.effective_rates
        rule = Rule(name, matrices, rest, budget, 0 if without else seeds)
        rules.append(asdict(rule))
    results = {
        "config": options.to_json(config),
        "nproc": nproc,
        "rules": rules,
        "sessions": [*there["sessions"], _session(given.jobs, typed)],
        "runs": [*there["runs"]],
    }
    if before:
        compared = {keys[name]["optimizer.name"] for name in before}
        _require_same(folder, there, results, compared)
    if (gpus := devices()) and given.jobs * nproc > len(gpus):
        raise ConfigError(f"--jobs {given.jobs} of {nproc} processes: there are {len(gpus)} GPUs")
    protocol = protocol_of(results)
    for name in names:  # also of the shortest runs, before any is begun
        for steps in protocol.lengths:
            options.replaced(config, {**keys[name], "training.steps": steps})
    check_input(config)
    return Comparison(folder, config, protocol, given.jobs, results)


def _common(path: str, overrides: Sequence[str], optimizers: set[str]) -> Config:
    """What all runs have in common: the config, with the section of each optimizer."""
    own: dict[str, Any] = {}
    general = [f"--optimizer.name={min(optimizers)}"]
    for key, text in options.split_arguments(overrides):
        head, _, name = key.rpartition(".")
        if key in ("output", "resume", "optimizer.name"):
            raise ConfigError(f"--{key} differs from run to run: compare sets it itself")
        if head == "optimizer" and key not in options.SCHEMA:
            raise ConfigError(f"--{key}: of which optimizer? Give --optimizer.NAME.{name}")
        if head.removeprefix("optimizer.") in optimizers:
            own |= options.parse_arguments([f"--{key}={text}"])
        else:
            general.append(f"--{key}={text}")
    values = options.to_values(options.load(path, general)) | own
    if values["schedule.min_lr"] is not None:
        raise ConfigError("schedule.min_lr is one rate for all: give schedule.min_lr_ratio instead")
    return options.build(values)


def _require_same(
    folder: Path, there: dict[str, Any], here: dict[str, Any], compared: set[str]
) -> None:
    """Refuses to add runs of another configuration, but for optimizers not compared so far."""
    then, now = ({**each["config"], "nproc": each["nproc"]} for each in (there, here))
    then = options.to_json(Config()) | then  # a key that is newer than the results had its default
    free = tuple(f"optimizer.{name}." for name in SECTIONS if name not in compared)
    differing = [
        key
        for key in {**then, **now}
        if then.get(key) != now.get(key) and key not in _INCIDENTAL and not key.startswith(free)
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds a comparison of another configuration (of another version, or with "
            f"another {', '.join(differing[:3])}): leave out CONFIG and these keys to continue "
            "it, or give another --output"
        )


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
