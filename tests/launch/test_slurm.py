"""launch/slurm.sh, with commands in the place of Slurm's that do on this machine what they ask."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch_jobs
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from launch_jobs import curve, metrics, succeed
from processes import DEADLINE, ENVIRONMENT, endless, wait_for_step

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
# Nodes of one machine: the command for each; SIGTERM goes to all, as srun passes it on.
while [[ $1 == --* ]]; do shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & all+=($!); done
trap 'kill -TERM "${all[@]}"' TERM
code=0
for each in "${all[@]}"; do
    while wait "$each"; last=$?; kill -0 "$each" 2>/dev/null; do :; done
    [ $last -eq 0 ] || code=$last
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show job" ]; then echo "JobId=$3 JobState=${STATE:-RUNNING}"; exit; fi
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; exit; fi
echo "scontrol $*" >> "$SCONTROL_LOG"
"""


PRETRAIN = "-m conda_dist.launch.pretrain"


def _starting(what: str, folder: Path) -> Path:
    """The script with ranks that run something else."""
    text = (ROOT / "launch" / "slurm.sh").read_text()
    assert PRETRAIN in text
    script = folder / "slurm.sh"
    script.write_text(text.replace(PRETRAIN, what))
    return script


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The variables of a job on two nodes, and the commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "launch").symlink_to(ROOT / "launch")
    (checkout / ".venv").symlink_to(sys.prefix)
    return {
        **ENVIRONMENT,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SCONTROL_LOG": str(tmp_path / "log"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost[1-2]",
        "SLURM_NTASKS_PER_NODE": "1",
    }


@pytest.mark.thorough
def test_a_job_is_requeued_until_it_is_complete(tmp_path: Path, slurm: dict[str, str]) -> None:
    config, output = launch_jobs.write_config(tmp_path), tmp_path / "run"
    script = ["bash", str(ROOT / "launch" / "slurm.sh")]
    job = [*map(str, endless(config, output)), "--checkpoint.interval", "0"]
    first = subprocess.Popen(
        [*script, *job],
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_step(output, 5, first)
        first.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@120 sends, to this script alone
        said, _ = first.communicate(timeout=DEADLINE)
    finally:
        subprocess.run(["pkill", "-9", "-s", str(first.pid)], check=False)
    assert first.returncode != 0
    assert f"scontrol requeue {slurm['SLURM_JOB_ID']}" in (tmp_path / "log").read_text(), said
    assert "2 nodes x 1 ranks, rendezvous at localhost:" in said
    assert re.search(r"^versions +Python .*, torch .*, transformers ", said, re.MULTILINE)
    (saved,) = complete_checkpoints(output / "checkpoints")
    assert step_of(saved) == metrics(output)[-1]["step"] >= 5

    # Once more, with a rank that says how it was started; the job itself goes on on kept processes.
    says = tmp_path / "says.py"
    says.write_text("import sys; print(*sys.argv[1:])")
    again = {**slurm, "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NUM_NODES": "1"}
    second = subprocess.run(
        ["bash", str(_starting(str(says), tmp_path)), *job],
        env=again,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "start 2: 1 nodes x 1 ranks" in second.stdout
    assert " ".join([*job, "--resume"]) in second.stdout
    assert "is complete" in second.stdout
    assert (tmp_path / "log").read_text().count("requeue") == 1
    whole, steps = tmp_path / "whole", ("--training.steps", step_of(saved) + 4)
    succeed(2, *job, *steps, "--resume")
    succeed(2, *endless(config, whole), "--checkpoint.interval", 0, *steps)
    assert curve(output) == curve(whole)


@pytest.mark.thorough
def test_a_job_that_fails_is_not_requeued(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Nor one whose ranks have died of a signal that nobody sent to torchrun."""
    dies = tmp_path / "dies.py"
    dies.write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    slurm["SLURM_JOB_NUM_NODES"] = "1"
    for what in (PRETRAIN, str(dies)):
        script = _starting(what, tmp_path)
        ended = subprocess.run(
            ["bash", str(script), "config.toml"],
            env=slurm,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert ended.returncode == 1
        assert "there is no config file config.toml" in ended.stderr or what == str(dies)
        assert not (tmp_path / "log").exists()


def test_a_preemption_that_signals_the_ranks_alone(tmp_path: Path, slurm: dict[str, str]) -> None:
    """They say in a note that they have stopped as asked; see test_launch_processes.py."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/sh\n: > "$CONDA_DIST_STOP_NOTE"\nexit 1\n')
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "config.toml"]
    assert subprocess.run(command, env=slurm, timeout=DEADLINE, check=False).returncode == 1
    for code in (1, 143):  # it fails after it has come back; its torchruns die of SIGTERM
        srun.write_text(f"#!/bin/sh\nexit {code}\n")
        assert subprocess.run(command, env=slurm, timeout=DEADLINE, check=False).returncode == code
    assert (tmp_path / "log").read_text().count("requeue") == 2
    assert not list(Path(slurm["SLURM_SUBMIT_DIR"]).glob(".stopped-*"))


@pytest.mark.parametrize(
    ("state", "number", "comes_back"),
    [
        ("RUNNING", signal.SIGTERM, True),  # a preemption's grace time
        ("COMPLETING", signal.SIGTERM, False),  # cancelled, or requeued by Slurm itself
        ("CANCELLED", signal.SIGTERM, False),
        ("COMPLETING", signal.SIGUSR1, True),  # saving took longer than the limit
    ],
)
def test_a_job_that_was_cancelled_does_not_come_back(
    state: str, number: int, comes_back: bool, tmp_path: Path, slurm: dict[str, str]
) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.write_text("#!/usr/bin/env bash\ntrap 'exit 1' TERM\necho started\nsleep 60 & wait\n")
    # srun has ended before the script takes its next step, as it may on a busy machine.
    slow = tmp_path / "slow"
    slow.write_text("case $0 in *slurm.sh) trap 'sleep 0.05' DEBUG ;; esac\n")
    job = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sh"), "config.toml"],
        env={**slurm, "STATE": state, "BASH_ENV": str(slow)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        while job.stdout.readline() != "started\n":
            assert job.poll() is None
        job.send_signal(number)
        assert job.wait(DEADLINE) == 1
    finally:
        subprocess.run(["pkill", "-9", "-s", str(job.pid)], check=False)
    assert (tmp_path / "log").exists() is comes_back


@pytest.mark.parametrize(
    ("gone", "words"), [("launch", "sbatch this from the checkout"), (".venv", "no ")]
)
def test_what_is_missing_is_named(slurm: dict[str, str], gone: str, words: str) -> None:
    checkout = Path(slurm["SLURM_SUBMIT_DIR"])
    place = checkout / gone
    place.rename(checkout / "elsewhere")
    ended = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh")], env=slurm, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert f"error: {words}" in ended.stderr
