"""One run of the pretraining job, from its configuration to its last checkpoint."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import socket
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conda_dist.launch.cluster import launcher, process_group
from conda_dist.launch.cluster.lock import locked
from conda_dist.launch.cluster.process_group import JobError, World
from conda_dist.launch.cluster.signals import stop_requests
from conda_dist.launch.data.batches import row_range
from conda_dist.launch.data.preparation import open_data
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import Checkpoints
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.deepspeed_file import read_file
from conda_dist.launch.job.engine import Engine, Fsdp2Engine
from conda_dist.launch.job.files import (
    CHECKPOINTS,
    CONFIG,
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    STOP_NOTE,
)
from conda_dist.launch.job.model import require_replicas
from conda_dist.launch.job.report import Reporter
from conda_dist.launch.job.trainer import BadStepsError, Trainer, require_same
from conda_dist.launch.job.watchdog import Watchdog
from conda_dist.numerics.refresh_hooks import register_refresh_hook


def start(config: Config) -> int:
    """Joins the other ranks, trains, and returns the process's exit code."""
    try:
        world = process_group.join(config.training.timeout_s)
        code = 0 if run(config, world) else EXIT_STOPPED
    except (ConfigError, JobError) as error:
        print(f"[rank {launcher.launched_rank()}] error: {error}", file=sys.stderr, flush=True)
        code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    # Both kinds of error are raised on every rank, so all of them come here. After any other
    # exception a rank must not wait for the rest: it ends, and its launcher ends the job.
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def run(config: Config, world: World) -> bool:
    """Trains to the end; returns False if the job was asked to stop before.

    Raises ConfigError or JobError, on every rank.
    """
    versions = used_versions(config)
    file = {"deepspeed.config": read_file(config)}
    process_group.require_agreement(world, options.to_values(config) | versions | file)
    for package in _optional(config):
        if not versions[package]:
            raise ConfigError(
                f"{package} is not installed, which engine {config.engine} with optimizer.name "
                f"{config.optimizer.name} needs: pip install {package}, or choose another"
            )
    row_range(config.training.global_batch_size, world.rank, world.size)
    require_replicas(config.training, world.size)
    checkpoints = Checkpoints(Path(config.output) / CHECKPOINTS, config.checkpoint.keep, world)
    # One that is named is looked at before the lock, which makes the output folder.
    named = config.resume not in ("", "auto")
    start = _start_at(Path(config.resume), config, checkpoints) if named else None
    with locked(Path(config.output), world):
        return _train(config, world, versions, checkpoints, start)


Start = tuple[Path, dict[str, Any], list[str]]
"""A checkpoint, its facts, and notes on settings that have changed since."""


def _start_at(path: Path, config: Config, checkpoints: Checkpoints) -> Start:
    """Raises ConfigError or CheckpointError, on every rank, if the checkpoint cannot be used."""
    facts = checkpoints.read_facts(path)
    return path, facts, require_same(path, facts, config)


def _train(
    config: Config,
    world: World,
    versions: dict[str, str],
    checkpoints: Checkpoints,
    start: Start | None,
) -> bool:
    """The rest of `run`, with the output folder to itself.

    Nothing is written there before all that may be refused has been looked at.
    """
    if start is None and (newest := find_checkpoint(config, checkpoints)) is not None:
        start = _start_at(newest, config, checkpoints)
    data = open_data(config, world)
    engine = build_engine(config, data.vocab_size, world)
    if not gc.isenabled():  # see pretrain.py
        gc.freeze()
        gc.enable()
    process_group.require_agreement(world, {"data": data.fingerprint, **engine.describe()})
    watchdog = Watchdog(world, config.training.stall_timeout_s, EXIT_FAILED)
    trainer = Trainer(config, world, engine, data, checkpoints, watchdog)
    path, facts, notes = start or (None, {}, [])
    if path is not None:
        notes = [*notes, *trainer.resume(path, facts)]
    prepare_output(config, world)
    ranks = Counter(process_group.gather(world, socket.gethostname()))
    hosts = ", ".join(f"{count} on {host}" for host, count in ranks.items())
    with stop_requests() as stop:
        reporter = Reporter(config, world, trainer.step)
        reporter.facts(
            {
                "ranks": f"{world.size} ({hosts}), {world.device.type}, {dist.get_backend()}",
                "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
                **engine.describe(),
                "data": data.description,
                "output": config.output,
                "start": f"step {trainer.step}, from {path or 'scratch'}",
            }
        )
        if world.is_main:
            engine.print_report()
        for note in notes:
            reporter.note(note)

        def decomposed(name: str) -> None:
            watchdog.go_on()
            reporter.decomposed(trainer.step + 1, name)

        with reporter.live(), watchdog.watching(), register_refresh_hook(decomposed):
            try:
                complete = trainer.train(reporter, stop)
            except BadStepsError as error:
                reporter.diverged(error)
                raise
        if complete:
            about = {"state_bytes": engine.state_bytes(), "data": data.fingerprint}
            reporter.complete({**trainer.summary(), **about})
        else:
            reporter.note(f"stopped after step {trainer.step}; continue with --resume")
            if world.is_main and (file := os.environ.get(STOP_NOTE)):
                with suppress(OSError):  # the checkpoint is saved
                    Path(file).touch()
    return complete


def build_engine(config: Config, vocab_size: int, world: World) -> Engine:
    """The engine the config names, in its state at step 0; raises ConfigError if it cannot be."""
    if config.engine == "fsdp2":
        return Fsdp2Engine(config, vocab_size, world)
    # DeepSpeed looks for these when it is imported and when its engine is made.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    from conda_dist.launch.job.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, vocab_size, world)


def _optional(config: Config) -> list[str]:
    """Packages that only this engine or optimizer needs."""
    engine = "deepspeed" if config.engine == "deepspeed" else ""
    return [package for package in (engine, config.optimizer.chosen.package) if package]


def used_versions(config: Config) -> dict[str, str]:
    """Versions of what the job runs on, in which its ranks must agree; "" if not installed."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "conda-dist", "transformers", "tokenizers", *_optional(config)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The newest checkpoint in the output, or None to start from scratch."""
    newest = checkpoints.newest()
    if newest is not None and not config.resume:
        raise ConfigError(
            f"{config.output} holds a run already ({newest.name}): continue it with --resume, "
            "or give another --output"
        )
    return newest


def prepare_output(config: Config, world: World) -> None:
    """Writes the resolved config, and makes sure that every rank sees the same folder."""
    resolved = Path(config.output) / CONFIG

    def write() -> None:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        resolved.write_text(options.to_toml(config))

    process_group.from_main(world, "preparing the output folder", write)
    with process_group.together(world, "looking into the output folder"):
        if not resolved.exists():
            raise FileNotFoundError(
                f"rank 0 wrote {resolved.absolute()}, which this rank does not see: set output to "
                "a folder on a file system that all hosts mount"
            )
