"""What the README says to type works."""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import models
import ranks

ROOT = Path(__file__).parents[2]
README = "".join((ROOT / folder / "README.md").read_text() for folder in (".", "integrations"))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS_README = (ROOT / "launch" / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README + COMMANDS_README, re.DOTALL))
SHELL = SHELL.replace("\\\n", " ")
COMMANDS = [line.partition(" #")[0].strip() for line in SHELL.splitlines() if line.strip()]
MODULES = sorted(set(re.findall(r"-m (conda_dist\S+)", SHELL)))


class _Output(NamedTuple):
    loss: Tensor


class _Language(nn.Module):
    """A model whose output has its loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        inner = models.Tiny()
        self.layers, self.inner = inner.blocks, inner

    def forward(self, tokens: Tensor) -> _Output:
        scores = self.inner(tokens).flatten(0, 1)
        return _Output(nn.functional.cross_entropy(scores, tokens.flatten()))


def _own_script() -> tuple[list[float], list[str]]:
    torch.manual_seed(0)
    model, losses = _Language(), list[float]()
    model.register_forward_hook(lambda *args: losses.append(args[2].loss.item()))
    batches = [torch.arange(12).reshape(2, 6)] * 30
    scope = {"model": model, "batches": batches}
    exec(PYTHON[0], scope)
    rows = scope["optimizer"].report(show=False)  # type: ignore[attr-defined]
    return losses, [row["path"] for row in rows]


def test_own_script() -> None:
    for losses, paths in ranks.run(2, _own_script):
        assert len(losses) == 30
        assert losses[-1] < losses[0] / 2
        assert set(paths) == {"conda", "adamw"}


def _placement() -> str:
    model = models.Tiny(width=12, hidden=24)
    scope = {"model": model, "mesh": init_device_mesh("cpu", (2,)), "block": model.blocks[0]}
    exec("from torch.distributed.fsdp import fully_shard\n" + PYTHON[1], scope)
    return str(model.blocks[0].down.weight.placements)


def test_placement() -> None:
    assert ranks.run(2, _placement) == ["(Shard(dim=1),)"] * 2


def test_commands_name_what_is_there() -> None:
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        for word in shlex.split(command):
            if word.startswith(("launch/", "tests/", "configs/")):
                assert (ROOT / word).exists(), command


def _run_module(module: str, arguments: list[str]) -> tuple[Any, str]:
    """What `python -m` does, in a process that has imported torch already."""
    before, said = sys.argv, io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code, said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


@pytest.mark.parametrize("module", MODULES)
def test_modules_run(module: str) -> None:
    arguments = ["--help"]
    if module.endswith("torchtitan.train"):
        arguments = ["--module", "llama3", "--config", "llama3_8b", "--help"]
    # One ends its process, and of torchtitan's what is imported stays for the tests after.
    if module == "conda_dist.launch.pretrain" or "torchtitan" in module:
        command = [sys.executable, "-m", module, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        code, said = ended.returncode, ended.stdout
    else:
        ((code, said),) = ranks.run(1, _run_module, module, arguments)
    assert not code, said
    assert "usage" in said.lower()
