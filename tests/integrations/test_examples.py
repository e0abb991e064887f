"""The examples run on two processes, learn, and resume as one process would go on."""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

import ranks
import titan_cpu
import titan_data
import titan_jobs
from hugging import fsdp_on_cpus, settle
from processes import free_port

EXAMPLES = Path(__file__).parents[2] / "integrations" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
RESUMED = {
    "huggingface_trainer": ("checkpoint-10", 4),  # an FSDP checkpoint needs FSDP: two ranks or more
    "lightning_fsdp2": ("step=10.ckpt", 1),
    "trl_lora": ("checkpoint-10", 1),
}
"""The checkpoint that an example writes after half of its steps, and the ranks that resume it."""
LEARNED = {"trl_lora": 0.3}
"""By how much the loss falls; adapters of a random model learn less."""


@pytest.fixture(scope="module", autouse=True)
def _own_processes() -> Iterator[None]:
    """Accelerate, ZeRO and torchtitan keep what they know of a process for good."""
    ranks.close()
    yield
    ranks.close()


def _run(script: str, port: int, *arguments: str) -> list[tuple[int, float]]:
    """The steps and losses that a script prints; it finds the ranks as under torchrun."""
    settle()
    dist.destroy_process_group()
    torchrun = {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    said = io.StringIO()
    with (
        patch.dict(os.environ, torchrun),
        patch.object(sys, "argv", [script, *arguments]),
        fsdp_on_cpus("trl" not in script),
        contextlib.redirect_stdout(said),
    ):
        runpy.run_path(script, run_name="__main__")
    lines = re.findall(r"^step (\d+) loss (\S+)$", said.getvalue(), re.M)
    return [(int(step), float(loss)) for step, loss in lines]


@functools.cache
def _two_ranks(script: Path) -> tuple[Path, list[tuple[int, float]], list[tuple[int, float]]]:
    """Where a script on two ranks writes, and what each rank prints."""
    output = Path(_outputs().name, script.stem)
    one, other = ranks.run(2, _run, str(script), free_port(), str(output))
    return output, one, other


@functools.cache
def _outputs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="examples-")


@pytest.mark.each_case
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts(script: Path) -> None:
    _, lines, nothing = _two_ranks(script)
    losses = dict(lines)
    assert list(losses) == list(range(20))
    assert losses[19] < losses[0] - LEARNED.get(script.stem, 0.5)
    assert not nothing
    command = f"torchrun --nproc-per-node 2 {script.relative_to(EXAMPLES.parents[1])}"
    assert command in script.read_text()


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.thorough
def test_scripts_resume(name: str, tmp_path: Path) -> None:
    script, (checkpoint, world) = EXAMPLES / f"{name}.py", RESUMED[name]
    output, lines, _ = _two_ranks(script)
    again, *_ = ranks.run(
        world, _run, str(script), free_port(), str(tmp_path / "again"), str(output / checkpoint)
    )
    (alone,) = ranks.run(1, _run, str(script), free_port(), str(tmp_path / "alone"))
    assert dict(alone) == pytest.approx(dict(lines), abs=2e-3)
    assert dict(again[-10:]) == pytest.approx(dict(lines[10:]), abs=2e-3)


def test_torchtitan() -> None:
    """The options of the command, as torchtitan's Trainer on CPUs takes them."""
    text = (EXAMPLES / "torchtitan.sh").read_text().replace("\\\n", " ")
    program, words = "conda_dist.integrations.torchtitan.train", shlex.split(text, comments=True)
    given = words[words.index(program) + 1 : words.index("$@")]
    small = ["--training.seq_len", str(titan_data.SEQUENCE), "--training.local_batch_size", "2"]
    arguments = [*given, *small, "--validator.no-enable", "--debug.seed", "1"]
    run, _ = ranks.run(2, titan_cpu.job, "launcher", titan_jobs.folder(), arguments)
    assert len(run.losses) == 10
    assert run.losses[-1] < run.losses[0] - 0.5
