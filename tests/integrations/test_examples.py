"""The examples run on two processes, and what they train learns."""

import contextlib
import io
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

import ranks
import titan_cpu
import titan_data
import titan_jobs
from processes import free_port
from test_huggingface import settle

EXAMPLES = Path(__file__).parents[2] / "integrations" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def _own_processes() -> Iterator[None]:
    """Accelerate, ZeRO and torchtitan keep what they know of a process for good."""
    ranks.close()
    yield
    ranks.close()


def _run(script: str, port: int) -> list[float]:
    """The losses that a script prints, which finds the ranks as torchrun's processes do."""
    settle()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    if "accelerate" in script:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        # Accelerate offers FSDP on accelerators alone.
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(script, run_name="__main__")
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", said.getvalue(), re.M)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts(script: Path) -> None:
    losses, nothing = ranks.run(2, _run, str(script), free_port())
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    assert not nothing
    command = f"torchrun --nproc-per-node 2 {script.relative_to(EXAMPLES.parents[1])}"
    assert command in script.read_text()


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
