"""Parameters that a framework has replaced, on two ranks: by flat ones, or after they had state."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import models
import ranks
import toys
from conda_dist import Conda, param_groups


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(2)]
        )
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def _backward(model: nn.Module) -> None:
    model(toys.random(4, 6)).square().sum().backward()


def _flattened(blocks: bool, before: bool, original: bool, grouped: bool = False) -> str:
    """What is said of FSDP1 around blocks or the model, after the optimizer was made or before."""
    model: nn.Module = _Model()
    options: Any = {"use_orig_params": original, "device_id": torch.device("cpu")}

    def wrapped() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not blocks:
                return FullyShardedDataParallel(model, **options)
            for i, block in enumerate(model.blocks):
                model.blocks[i] = FullyShardedDataParallel(block, **options)
        return model

    def made(of: nn.Module) -> Conda:
        return Conda(param_groups(of) if grouped else of.named_parameters())

    def trained() -> None:
        optimizer = made(model) if before else None
        sharded = wrapped()
        optimizer = optimizer or made(sharded)
        _backward(sharded)
        optimizer.step()

    return models.attempt(trained)


def _all_flattened() -> list[str]:
    ways = (False, True)
    said = [_flattened(a, b, c) for a in ways for b in ways for c in ways]
    return said + [_flattened(blocks, False, c, True) for blocks in ways for c in ways]


def test_flat_parameters_of_fsdp1_are_refused() -> None:
    for said in ranks.run(2, _all_flattened)[0]:
        assert "fully_shard" in said
        assert "conda=[" not in said
        assert "Error: " in said
        assert "blocks.0.0.weight" in said or "_flat_param" in said


def test_fsdp1_that_leaves_shapes_alone_trains() -> None:
    """On one rank it shards nothing, and with use_orig_params leaves parameters as they are."""
    said = ranks.run(1, _flattened, True, False, True)[0]
    assert said == ranks.run(1, models.attempt, _nothing)[0]


def _nothing() -> None:
    pass


def _loaded() -> tuple[nn.Module, Conda]:
    """A model, and an optimizer into which a checkpoint was loaded."""
    model = _Model()
    optimizer = Conda(model.named_parameters())
    _backward(model)
    optimizer.step()
    optimizer.zero_grad()
    saved = optimizer.state_dict()
    model = _Model()
    optimizer = Conda(model.named_parameters())
    optimizer.load_state_dict(saved)
    return model, optimizer


def _shard(model: nn.Module, optimizer: Conda, swap: bool) -> None:
    """Shards a model and, as Accelerate does, puts the new parameters into the groups."""
    names = {id(param): name for name, param in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    now = dict(model.named_parameters())
    for group in optimizer.param_groups if swap else ():
        group["params"] = [now[names[id(param)]] for param in group["params"]]
    _backward(model)


def _too_late() -> dict[str, str]:
    said = {}
    model, optimizer = _loaded()
    _shard(model, optimizer, swap=False)
    said["save of the old"] = models.attempt(optimizer.state_dict)
    said["save of the old by torch"] = models.attempt(
        lambda: get_optimizer_state_dict(model, optimizer)
    )
    said["step of the old"] = models.attempt(optimizer.step)
    said["and again"] = models.attempt(optimizer.step)
    for made in ("allocated", "stepped"):
        model = _Model()
        optimizer = Conda(model.named_parameters())
        if made == "allocated":
            optimizer.init_state()
        else:
            _backward(model)
            optimizer.step()
            optimizer.zero_grad()
        _shard(model, optimizer, swap=False)
        said[f"step of the old, {made}"] = models.attempt(optimizer.step)
    model, optimizer = _loaded()
    saved = optimizer.state_dict()
    _shard(model, optimizer, swap=True)
    said["save"] = models.attempt(optimizer.state_dict)
    said["save by torch"] = models.attempt(lambda: get_optimizer_state_dict(model, optimizer))
    said["step"] = models.attempt(optimizer.step)
    optimizer.load_state_dict(saved)  # as the errors say
    optimizer.step()
    said["counted"] = str({float(state["step"]) for state in optimizer.state.values()})
    return said


@pytest.mark.thorough
def test_sharding_a_model_whose_optimizer_has_state() -> None:
    for said in ranks.run(2, _too_late):
        assert said.pop("counted") == "{2.0}"
        for text in said.values():
            assert "Error: " in text
            assert "First replace the parameters (fully_shard, accelerator.prepare" in text


def _unsharded_beside_sharded() -> None:
    """A model and a sharded copy, each with its optimizer."""
    model, optimizer = _loaded()
    other = _Model()
    fully_shard(other, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    theirs = Conda(other.named_parameters())
    for _ in range(2):
        _backward(model)
        _backward(other)
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        optimizer.step()  # without a gradient
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    get_optimizer_state_dict(model, optimizer)


def test_a_sharded_copy_of_a_model_is_another_model() -> None:
    ranks.run(2, _unsharded_beside_sharded)


def _resharded(before: Placement, after: Placement, algorithm: str) -> str:
    """A DTensor that is swapped for one of other placements."""
    mesh = init_device_mesh("cpu", (2,))
    whole = toys.random(6, 8)
    param = nn.Parameter(distribute_tensor(whole, mesh, [before]))
    optimizer = Conda([{"params": [("w", param)], "algorithm": algorithm}])
    param.grad = distribute_tensor(whole, mesh, [before])
    optimizer.step()
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(distribute_tensor(whole, mesh, [after])))
    param.grad = distribute_tensor(whole, mesh, [after])
    return models.attempt(optimizer.step)


def _all_resharded() -> list[str]:
    rows, columns, copies = Shard(0), Shard(1), Replicate()
    pairs = ((rows, columns), (rows, copies), (copies, columns))
    return [_resharded(a, b, "adamw") for a, b in pairs] + [_resharded(rows, copies, "conda")]


def test_other_placements_are_refused() -> None:
    for said in ranks.run(2, _all_resharded, timeout=60):
        for text in said:
            assert "w: rank 0 holds" in text
            assert "resharded" in text


def _gradient(change: str, algorithm: str, later: bool) -> str:
    """The gradient of one rank, or of all, does not fit its parameter."""
    mesh = init_device_mesh("cpu", (2,))
    whole = toys.random(8, 6)
    param = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = Conda([{"params": [("w", param)], "algorithm": algorithm}])
    param.grad = distribute_tensor(whole, mesh, [Shard(0)])
    if later:
        optimizer.step()
    if change == "mesh":
        square = init_device_mesh("cpu", (2, 1))
        param.grad = distribute_tensor(whole, square, [Shard(0), Replicate()])
    elif change == "shards" or dist.get_rank() == 1:
        param.grad._local_tensor = torch.ones(2, 6)  # type: ignore[attr-defined]
    return models.attempt(optimizer.step)


def _all_gradients() -> list[str]:
    cases = [(c, later) for c in ("mesh", "shards") for later in (False, True)]
    cases.append(("one rank", False))
    return [_gradient(c, a, later) for c, later in cases for a in ("conda", "adamw")]


def test_gradients_that_do_not_fit() -> None:
    """All ranks hear of it, though one has it alone, in the first step."""
    for said in ranks.run(2, _all_gradients, timeout=60):
        for text in said:
            assert "w: its gradient is on DeviceMesh" in text or "of its gradient" in text


def _other_placements() -> None:
    """A gradient that only has other placements is brought to the parameter's."""
    mesh = init_device_mesh("cpu", (2,))
    whole = toys.random(8, 6)
    for algorithm in ("conda", "adamw"):
        params = [nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(2)]
        for param, there in zip(params, (Shard(0), Replicate()), strict=True):
            optimizer = Conda([{"params": [param], "algorithm": algorithm}])
            param.grad = distribute_tensor(whole, mesh, [there])
            optimizer.step()
        assert torch.equal(*(param.detach().full_tensor() for param in params))  # type: ignore[attr-defined]


def test_gradients_of_other_placements() -> None:
    ranks.run(2, _other_placements)
