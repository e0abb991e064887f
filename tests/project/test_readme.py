"""What the README says to type works."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import models
import ranks
from processes import forked

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


@pytest.mark.parametrize("module", MODULES)
def test_modules_run(module: str) -> None:
    arguments = ["--help"]
    if module.endswith("torchtitan.train"):
        arguments = ["--module", "llama3", "--config", "llama3_8b", "--help"]
    with forked("-m", module, *arguments) as process:
        said, _ = process.communicate(120)
    assert process.returncode == 0, said
    assert "usage" in said.lower()
