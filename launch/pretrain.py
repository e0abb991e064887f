"""Layer: launch. The pretraining job: `python -m conda_dist.launch.pretrain CONFIG [--key value]`.

Runs as one process or, started by torchrun, mpirun or DeepSpeed's launcher, as many. Exit codes: 0
the run is complete; 1 it failed; 2 the configuration is wrong; 75 it was asked to stop (Ctrl-C,
SIGTERM, SIGUSR1), saved a checkpoint and can be continued with `--resume`. torchrun passes on the
first two signals, the third if `--signals-to-handle` has it, kills what has not ended after 30 s
(`--shutdown-timeout`), and exits with a code of its own. `launch/train.sh` sets both options.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from conda_dist.launch.cluster import process_group
from conda_dist.launch.cluster.lock import locked
from conda_dist.launch.cluster.process_group import JobError, World
from conda_dist.launch.cluster.signals import end_with_launcher, stop_requests
from conda_dist.launch.data.batches import row_range
from conda_dist.launch.data.preparation import open_data
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import Checkpoints
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.engine import Engine, Fsdp2Engine
from conda_dist.launch.job.report import Reporter
from conda_dist.launch.job.trainer import Trainer
from conda_dist.launch.job.watchdog import Watchdog

EXIT_FAILED, EXIT_CONFIG = 1, 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: not finished, worth starting again."""

STOP_NOTE = "CONDA_DIST_STOP_NOTE"
"""Variable that names a file to make when the job has stopped as asked, for scripts such as
`slurm.sh`: launchers exit with codes of their own."""

RESOLVED_CONFIG, CHECKPOINTS = "config.toml", "checkpoints"

_USAGE = """usage: python -m conda_dist.launch.pretrain CONFIG [--section.key value ...]
       torchrun --standalone --nproc-per-node=N -m conda_dist.launch.pretrain CONFIG ...
       mpirun -n N python -m conda_dist.launch.pretrain CONFIG ...
       deepspeed --num_gpus N --module conda_dist.launch.pretrain CONFIG --engine deepspeed ...

Pretrains a causal language model. CONFIG is a TOML file such as configs/llama_tiny.toml.

--output DIR           folder of everything the run writes
--engine NAME          fsdp2, or deepspeed with --deepspeed.stage 0 to 3
--resume [CHECKPOINT]  continue from the newest checkpoint in the output (or from that one)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job and returns the process's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--local_rank="):
        del given[0]  # DeepSpeed's launcher says it here and in LOCAL_RANK
    if {"-h", "--help"} & set(given):
        print(_USAGE + "\n" + options.help_text())
        return 0
    try:
        path = given.pop(0) if given and not given[0].startswith("--") else None
        config = options.load(path, given)
    except ConfigError as error:
        # Once on every host: the file may be missing on one alone.
        if (rank := process_group.launched_rank()) == 0 or process_group.is_first_of_host():
            print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        end_with_launcher()
        world = process_group.join(config.training.timeout_s)
        code = 0 if run(config, world) else EXIT_STOPPED
    except (ConfigError, JobError) as error:
        print(f"[rank {process_group.launched_rank()}] error: {error}", file=sys.stderr, flush=True)
        code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    # Both kinds of error are raised on every rank, so all of them come here. After any other
    # exception a rank must not wait for the rest: it ends, and its launcher ends the job.
    process_group.leave()
    return code


def run(config: Config, world: World) -> bool:
    """Trains to the end; returns False if the job was asked to stop before.

    Raises:
        ConfigError: The configuration does not fit this job.
        JobError: On every rank: ranks differ, a checkpoint cannot be used, a loss is not finite,
            or something failed on one of them.
    """
    versions = used_versions(config)
    process_group.require_agreement(world, options.to_values(config) | versions)
    if not versions.get("deepspeed", "not used"):
        raise ConfigError(
            "engine deepspeed: DeepSpeed is not installed; pip install 'conda-dist[deepspeed]', "
            "or give --engine fsdp2"
        )
    row_range(config.training.global_batch_size, world.rank, world.size)
    with locked(Path(config.output), world):
        return _train(config, world, versions)


def _train(config: Config, world: World, versions: dict[str, str]) -> bool:
    """The rest of `run`, with the output folder to itself."""
    checkpoints = Checkpoints(Path(config.output) / CHECKPOINTS, config.checkpoint.keep, world)
    source = find_checkpoint(config, checkpoints)
    prepare_output(config, world)
    data = open_data(config, world)
    engine = build_engine(config, data.vocab_size, world)
    process_group.require_agreement(world, {"data": data.fingerprint, **engine.describe()})
    watchdog = Watchdog(world, config.training.stall_timeout_s, EXIT_FAILED)
    trainer = Trainer(config, world, engine, data, checkpoints, watchdog)
    notes = trainer.resume(source) if source is not None else []
    hosts = ", ".join(f"{count} on {host}" for host, count in process_group.hosts(world).items())
    with stop_requests() as stop:
        reporter = Reporter(config, world, trainer.step)
        reporter.facts(
            {
                "ranks": f"{world.size} ({hosts}), {world.device.type}, {dist.get_backend()}",
                "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
                **engine.describe(),
                "data": data.description,
                "output": config.output,
                "start": f"step {trainer.step}, from {source or 'scratch'}",
            }
        )
        if world.is_main:
            engine.print_report()
        for note in notes:
            reporter.note(note)
        with reporter.live(), watchdog.watching():
            complete = trainer.train(reporter, stop)
        if complete:
            reporter.complete(trainer.summary())
        else:
            reporter.note(f"stopped after step {trainer.step}; continue with --resume")
            if world.is_main and (file := os.environ.get(STOP_NOTE)):
                with suppress(OSError):  # the checkpoint is saved
                    Path(file).touch()
    return complete


def build_engine(config: Config, vocab_size: int, world: World) -> Engine:
    """The engine the config names, in its state at step 0.

    Raises:
        ConfigError: The configuration does not fit this job.
        JobError: On every rank: something it needs cannot be read.
    """
    if config.engine == "fsdp2":
        return Fsdp2Engine(config, vocab_size, world)
    # DeepSpeed looks for these when it is imported and when its engine is made.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    from conda_dist.launch.job.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, vocab_size, world)


def used_versions(config: Config) -> dict[str, str]:
    """Versions of what the job runs on, in which its ranks must agree; "" if not installed."""
    packages = ["conda-dist", "transformers", "tokenizers"]
    if config.engine == "deepspeed":
        packages.append("deepspeed")
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    found["numpy"] = np.__version__
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to start from, or None to start from scratch.

    Raises:
        ConfigError: The output holds a run and `resume` does not say what to do with it.
    """
    if config.resume not in ("", "auto"):
        return Path(config.resume)
    newest = checkpoints.newest()
    if newest is not None and not config.resume:
        raise ConfigError(
            f"{config.output} holds a run already ({newest.name}): continue it with --resume, "
            "or give another --output"
        )
    return newest


def prepare_output(config: Config, world: World) -> None:
    """Writes the resolved config, and makes sure that every rank sees the same folder.

    Raises:
        JobError: On every rank: the folder cannot be written, or is not shared between hosts.
    """
    resolved = Path(config.output) / RESOLVED_CONFIG

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


if __name__ == "__main__":
    process_group.end(main())
