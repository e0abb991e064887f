"""Convolution kernels as matrices (out, in * k * k), by ``param_groups(model, kernels=True)``."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import models
import ranks
from conda_dist import Conda, param_groups
from conda_dist.reference import ReferenceConda

SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "update_proj_gap": 2}


def _convolutions() -> nn.Module:
    """Wide, tall, 1x1, grouped, depthwise, of one dimension and of three, and a weight beside."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "wide": nn.Conv2d(4, 6, 3),
            "tall": nn.Conv2d(2, 50, 3),
            "point": nn.Conv2d(6, 12, 1),
            "grouped": nn.Conv2d(12, 8, 3, groups=2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "sequence": nn.Conv1d(4, 6, 3),
            "volume": nn.Conv3d(2, 6, 2),
            "linear": nn.Linear(6, 4),
        }
    )


def _reference(model: nn.Module, steps: Iterable[int]) -> dict[str, Tensor]:
    """What the oracle makes of ``weight.flatten(1)``, and of each group's rows of it."""
    parts: dict[str, list[nn.Parameter]] = {}
    groups = []
    for name, param in model.named_parameters():
        count = 2 if name == "grouped.weight" else 1
        rows = param.detach().flatten(1) if param.ndim > 1 else param.detach()
        parts[name] = [nn.Parameter(part.clone()) for part in rows.chunk(count)]
        adamw = param.ndim < 2 or name == "depthwise.weight"
        groups.append({"params": parts[name], "algorithm": "adamw" if adamw else "conda"})
    optimizer = ReferenceConda(groups, **SETTINGS)
    for step in steps:
        for name, param in model.named_parameters():
            grad = models.gradient(name, param, step)
            whole = grad.flatten(1) if grad.ndim > 1 else grad
            for part, of_part in zip(parts[name], whole.chunk(len(parts[name])), strict=True):
                part.grad = of_part
        optimizer.step()
    return {name: torch.cat(held).detach() for name, held in parts.items()}


def test_a_kernel_is_one_matrix() -> None:
    """Gradients may be channels_last, as convolutions of such inputs give them."""
    model = _convolutions()
    expected = _reference(model, range(5))
    optimizer = Conda(param_groups(model, kernels=True), **SETTINGS)
    for step in range(5):
        for name, param in model.named_parameters():
            param.grad = models.gradient(name, param, step)
            if param.ndim == 4 and step % 2:
                param.grad = param.grad.to(memory_format=torch.channels_last)
        optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach().view(expected[name].shape), expected[name])
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[param][key].shape == param.shape
    weights: dict[str, Any] = dict(model.named_modules())
    assert optimizer.state[weights["wide"].weight]["basis"].shape == (6, 6)
    assert optimizer.state[weights["tall"].weight]["basis"].shape == (18, 18)
    assert optimizer.state[weights["grouped"].weight]["basis_1"].shape == (4, 4)
    assert "basis" not in optimizer.state[weights["depthwise"].weight]


def test_its_checkpoint() -> None:
    """Resumed bit for bit."""
    model = _convolutions()
    optimizer = Conda(param_groups(model, kernels=True), **SETTINGS)
    models.train(model, optimizer, range(3))
    resumed = _convolutions()
    resumed.load_state_dict(model.state_dict())
    again = Conda(param_groups(resumed, kernels=True), **SETTINGS)
    again.load_state_dict(optimizer.state_dict())
    for a, b in ((model, optimizer), (resumed, again)):
        models.train(a, b, range(3, 6))
    ours, theirs = models.snapshot(model, optimizer), models.snapshot(resumed, again)
    assert not models.unequal(ours, theirs)


def test_a_checkpoint_of_kernels_seen_otherwise() -> None:
    optimizers = []
    for seen in ({"kernels": True}, {}):
        kernel = nn.Parameter(torch.randn(6, 4, 3))
        kernel.grad = torch.ones(6, 4, 3)
        optimizers.append(Conda([{"params": [("k", kernel)], "algorithm": "conda", **seen}]))
        optimizers[-1].step()
    for saved, other in (optimizers, optimizers[::-1]):
        with pytest.raises(ValueError, match="k: the checkpoint was written with kernels="):
            other.load_state_dict(saved.state_dict())


def test_fused_rows_of_a_kernel() -> None:
    """Diffusion models fuse q, k and v in a convolution of one pixel."""
    model = nn.ModuleDict({"qkv": nn.Conv1d(4, 12, 1, bias=False)})
    groups = param_groups(model, kernels=True, splits={"qkv.weight": 3})
    assert [group["splits"] for group in groups] == [(4, 4, 4)]
    optimizer = Conda(groups, **SETTINGS)
    models.train(model, optimizer, range(2))
    assert optimizer.state[model["qkv"].weight]["basis_2"].shape == (4, 4)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "channels_last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        {"kernels": True},
        r"kernel\.weight: .*channels_last",
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        {"kernels": True},
        r'kernel\.weight: .*transposed.*adamw=\["kernel\.weight"\]',
    ),
    "transposed, forced": (
        lambda: nn.ConvTranspose1d(4, 6, 3),
        {"conda": ["kernel.*"], "adamw": ["*.bias"]},
        r"kernel\.weight: .*transposed",
    ),
    "depthwise, forced": (
        lambda: nn.Conv1d(4, 4, 3, groups=4, bias=False),
        {"conda": ["kernel.*"]},
        r"kernel\.weight: .*4 groups",
    ),
    "groups and splits": (
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        {"kernels": True, "splits": {"kernel.weight": 3}},
        r"kernel\.weight: .*2 groups",
    ),
    "no whole parts": (
        lambda: nn.Conv1d(4, 6, 3),
        {"kernels": True, "splits": {"kernel.weight": 4}},
        r"kernel\.weight: 6 rows",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], arguments: dict[str, Any], words: str) -> None:
    model = nn.ModuleDict({"kernel": make(), "up": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=words):
        param_groups(model, **arguments)


def test_a_kernel_by_itself_is_no_batch_of_matrices() -> None:
    """Forced to the conda path by a pattern it is one matrix, too; by default it is AdamW's."""
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, bias=False), "up": nn.Linear(3, 3)})
    assert [len(g["params"]) for g in param_groups(model)] == [1, 2]
    forced = param_groups(model, conda=["conv.weight"])
    assert forced[1]["kernels"]
    assert [name for name, _ in forced[1]["params"]] == ["conv.weight"]
    with pytest.raises(ValueError, match='kernels=True needs algorithm="conda"'):
        Conda([{"params": model["conv"].parameters(), "kernels": True}])
    with pytest.raises(TypeError, match="kernels must be a bool"):
        Conda([{"params": model["conv"].parameters(), "algorithm": "conda", "kernels": 1}])


def test_a_kernel_that_became_channels_last() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "up": nn.Linear(3, 3)})
    optimizer = Conda(param_groups(model, kernels=True), **SETTINGS)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"conv\.weight: .*channels_last"):
        models.train(model, optimizer, range(1))


# On ranks


def _sharded() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 5, 3, bias=False),
        nn.Conv2d(2, 51, 3, bias=False),
        nn.Conv1d(8, 10, 3, groups=2, bias=False),
        nn.Linear(5, 4),
    )


def _on_ranks(folder: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Steps under FSDP2, resumes from a checkpoint, and what other shards are told."""
    model = fully_shard(_sharded(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = Conda(param_groups(model, kernels=True), **SETTINGS)
    models.train(model, optimizer, range(3))
    models.save(folder, model, optimizer)
    models.train(model, optimizer, range(3, 5))
    ended = models.snapshot(model, optimizer)
    models.load(folder, model, optimizer)
    models.train(model, optimizer, range(3, 5))
    unequal = models.unequal(ended, models.snapshot(model, optimizer))
    said = []
    for dim, shape in ((1, (6, 4, 3, 3)), (1, (6, 5, 3, 3)), (2, (6, 4, 4, 3))):
        torch.manual_seed(0)
        whole, grad = torch.randn(shape), torch.randn(shape)
        placed = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(dim)])
        param = nn.Parameter(placed)
        group = {"params": [("conv", param)], "algorithm": "conda", "kernels": True}
        shards = Conda([group], **SETTINGS)
        param.grad = models.like(param, grad)
        said.append(models.attempt(shards.step))
        if said[-1] == "nothing was raised":
            said[-1] = _off(whole, grad, param)
    return models.snapshot(model, optimizer, models.whole), unequal, said


def _off(whole: Tensor, grad: Tensor, param: Tensor) -> str:
    alone = nn.Parameter(whole.flatten(1).clone())
    optimizer = ReferenceConda([alone], **SETTINGS)
    alone.grad = grad.flatten(1)
    optimizer.step()
    close = torch.allclose(models.whole(param).flatten(1), alone.detach(), atol=1e-5)
    return "right" if close else "wrong"


def test_shards(tmp_path: Path) -> None:
    """Shards of ``out`` and even ones of ``in`` are right; others are refused on all ranks."""
    alone = _sharded()
    optimizer = Conda(param_groups(alone, kernels=True), **SETTINGS)
    start = models.snapshot(alone, optimizer)
    models.train(alone, optimizer, range(5))
    expected = models.snapshot(alone, optimizer)
    for ended, unequal, said in ranks.run(2, _on_ranks, str(tmp_path)):
        assert not unequal
        assert models.farthest(ended, expected, start) < 1e-4
        assert ended["0.weight:exp_avg"].shape == (5, 4, 3, 3)
        assert said[0] == "right"
        for refused in said[1:]:
            assert "ValueError: conv: a kernel (6, " in refused
            assert "shard dimension 0" in refused
