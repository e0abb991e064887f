"""The runs of a comparison: started, stopped, resumed, and kept when they are finished.

A comparison's folder holds `config.toml`, what all runs have in common; `runs`, with each run's
folder and log; and `results.json`, with each finished run's record, of which tables are made.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conda_dist.launch.cluster.signals import end_with_parent, stop_requests
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.files import CHECKPOINTS, CONFIG, DIVERGED, METRICS, SUMMARY, write_whole
from conda_dist.launch.job.metrics import read_metrics
from conda_dist.launch.tools.protocol import RESULTS, Comparison, devices, read
from conda_dist.launch.tools.search import Run


def run_of(record: dict[str, Any]) -> Run:
    """The run that a record is of."""
    return Run(*(record[key] for key in ("rule", "matrices", "rest", "seed", "steps")))


def loss_of(record: dict[str, Any]) -> float:
    """Its final validation loss in nats per token; infinite if it diverged."""
    return math.inf if record["val_loss"] is None else float(record["val_loss"])


def losses_of(records: Sequence[dict[str, Any]]) -> dict[Run, float]:
    """The losses of all finished runs."""
    return {run_of(record): loss_of(record) for record in records}


def finished(folder: Path) -> dict[str, Any] | None:
    """What a run has left in its folder; None: it is neither complete nor has it diverged."""
    complete = (folder / SUMMARY).exists()
    if not complete and not (folder / DIVERGED).exists():
        return None
    summary = json.loads((folder / SUMMARY).read_text()) if complete else {}
    loss, lines = summary.get("val_loss", math.inf), read_metrics(folder / METRICS)
    steps = [0, *(line["step"] for line in lines)]  # a line has means since the one before
    means = {
        key: sum(line[key] * (line["step"] - at) for line, at in zip(lines, steps, strict=False))
        / max(1, steps[-1])
        for key in ("step_s", "optimizer_s")
    }
    curve = [(line["step"], line["val_loss"]) for line in lines if line["val_loss"] is not None]
    return {
        "val_loss": loss if math.isfinite(loss) else None,
        "state_bytes": summary.get("state_bytes"),
        "data": summary.get("data"),
        **means,
        "skipped": lines[-1]["skipped"] if lines else 0,
        "curve": [point for point in curve if math.isfinite(point[1])],
    }


class Runner:
    """Runs what a comparison wants, several at once, until nothing is left or it is stopped."""

    def __init__(self, comparison: Comparison) -> None:
        """Writes what the runs have in common.

        Raises:
            ConfigError: The folder is not as it was when the comparison was planned.
        """
        self._comparison, folder = comparison, comparison.folder
        there = read(folder)["sessions"] if (folder / RESULTS).exists() else []
        if there != comparison.results["sessions"][:-1]:
            raise ConfigError(f"another command has just written {folder}: give this one again")
        self._records = comparison.results["runs"]
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, options.to_toml(comparison.config))
        self._running: dict[Run, tuple[subprocess.Popen[bytes], int, float]] = {}
        """Of each run its process, its place among the jobs, and when it was started."""
        self.failed: dict[Run, str] = {}
        """Runs that neither completed nor diverged, and what they said."""
        self._write()

    def run(self) -> bool:
        """Returns False if it was asked to stop: the runs have saved and ended then."""
        protocol, wanted = self._comparison.protocol, list[Run]()
        told = False
        with stop_requests() as stop:
            ended = True
            while True:
                if ended:  # only then: it takes milliseconds, which the runs would miss
                    wanted, _ = protocol.ahead(losses_of(self._records))
                begun = {*self._running, *self.failed}
                free = self._comparison.jobs - len(self._running)
                for run in [run for run in wanted if run not in begun][:free]:
                    if not stop:
                        self._start(run)
                if stop and not told:
                    told = True
                    for job, *_ in self._running.values():
                        job.terminate()
                if not self._running:
                    return not stop
                time.sleep(0.1)
                done = [run for run, (job, *_) in self._running.items() if job.poll() is not None]
                for run in done:
                    self._end(run, stopped=bool(stop))
                ended = bool(done)

    def _start(self, run: Run) -> None:
        folder, log = self._paths(run)
        taken = [place for _, place, _ in self._running.values()]
        place = next(n for n in range(self._comparison.jobs) if n not in taken)
        _say(f"{'continues' if folder.exists() else 'begins'}: {run.name}")
        with log.open("ab") as said:
            # In a session of its own it hears of a Ctrl-C once, from here; by SIGTERM, which
            # torchrun passes on to its processes. It also gets one if this process is killed.
            job = subprocess.Popen(
                [sys.executable, *self._comparison.command(run)[1:]],
                stdout=said,
                stderr=said,
                env={**os.environ, **environment_of(self._comparison, place, devices())},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._running[run] = job, place, time.monotonic()

    def _end(self, run: Run, *, stopped: bool) -> None:
        _, _, started = self._running.pop(run)
        (folder, log), results = self._paths(run), self._comparison.results
        if (found := finished(folder)) is None:
            if not stopped:
                lines = log.read_text(errors="replace").splitlines()
                errors = [line.strip() for line in lines if "error" in line.lower()]
                self.failed[run] = errors[-1] if errors else f"see {log}"
                _say(f"failed: {run.name}: {self.failed[run]}")
            return
        record = {
            **asdict(run),
            **found,
            "ended": time.time(),
            "wall_s": time.monotonic() - started,
            "session": len(results["sessions"]) - 1,
            "command": shlex.join(self._comparison.command(run)),
        }
        self._records.append(record)
        self._write()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nothing resumes it any more
        _, left = self._comparison.protocol.ahead(losses_of(self._records))
        each = statistics.fmean(record["wall_s"] / record["steps"] for record in self._records)
        loss = "diverged" if found["val_loss"] is None else f"{found['val_loss']:.4f}"
        _say(
            f"{loss}: {run.name}; {len(self._records)} runs are finished, at most "
            f"{left * each / self._comparison.jobs / 3600:.2f} hours are left"
        )

    def _paths(self, run: Run) -> tuple[Path, Path]:
        """A run's folder and log."""
        runs = self._comparison.folder / "runs"
        return runs / run.name, runs / f"{run.name}.log"

    def _write(self) -> None:
        """Writes results.json, whole or not at all."""
        text = json.dumps(self._comparison.results, indent=1)
        write_whole(self._comparison.folder / RESULTS, text)


def environment_of(comparison: Comparison, place: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables for one of several runs at once: its share of the cores, and GPUs of its own."""
    processes = comparison.results["nproc"]
    threads = max(1, (os.cpu_count() or 1) // (processes * comparison.jobs))
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * processes : (place + 1) * processes])
    return found


def _say(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)
