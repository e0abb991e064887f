"""Real models under FSDP2, HSDP and DDP follow the one-process run; replicas never part."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from transformers import LlamaConfig, LlamaForCausalLM

import ranks
from conda_dist import Conda, param_groups
from conda_dist.reference import ReferenceConda

STEPS, GAP, BATCH = 7, 3, 12
SETTINGS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-4, "update_proj_gap": GAP, "weight_decay": 0.1}
"""eps of 1e-4: gradients of so small a batch have a low rank, and a small eps would amplify the
rounding of what should be zero."""


def _llama() -> nn.Module:
    """Tall, square and wide weights that no rank count divides evenly, and a shape of one row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def _loss(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(67, (BATCH, 16), generator=generator)
    mine = tokens[rank * BATCH // world : (rank + 1) * BATCH // world]
    loss: Tensor = model(input_ids=mine, labels=mine).loss
    return loss


def _mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _shard(model: nn.Module, mesh: Any, **options: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int) -> None:
    for step in range(STEPS):
        _loss(model, step, rank, world).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def one_process() -> dict[str, Tensor]:
    """The paper's order of operations on one process."""
    model = _llama()
    groups = param_groups(model)
    for group in groups:
        group["params"] = [param for _, param in group["params"]]
    _train(model, ReferenceConda(groups, **SETTINGS), 0, 1)
    return _whole(model)


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Worst distance of a parameter, relative to the way it came."""
    start = _whole(_llama())
    return max(
        ((ours[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()).item()
        for name in theirs
    )


def _fsdp(mesh_shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    model = _llama()
    mesh = _mesh(*mesh_shape)
    shard_columns = options.pop("columns", False)

    def place(param: nn.Parameter) -> Shard | None:
        wide = param.ndim == 2 and param.shape[0] < param.shape[1]
        return Shard(1) if wide and param.shape[1] % mesh_shape[-1] == 0 else None

    _shard(model, mesh, **({"shard_placement_fn": place} if shard_columns else {}))
    optimizer = Conda(param_groups(model), **SETTINGS, **options)
    _train(model, optimizer, dist.get_rank(), dist.get_world_size())
    return _whole(model)


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ((1,), {}),
        ((2,), {}),
        ((2,), {"columns": True}),
        ((2,), {"basis_budget": 0, "buffer_bytes": 4000}),
        ((3,), {}),
        ((4,), {"basis_budget": 0}),
        ((2, 2), {}),
        ((2, 2), {"basis_budget": 0}),
    ],
    ids=str,
)
def test_follows_one_process(
    mesh_shape: tuple[int, ...], options: dict[str, Any], one_process: dict[str, Tensor]
) -> None:
    for whole in ranks.run(math.prod(mesh_shape), _fsdp, mesh_shape, options):
        assert _distance(whole, one_process) < 1e-3


def _ddp(shared: bool) -> tuple[dict[str, Tensor], list[list[int]]]:
    model = _llama()
    optimizer = Conda(
        param_groups(model), **SETTINGS, process_group=dist.group.WORLD if shared else None
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    _train(parallel, optimizer, dist.get_rank(), dist.get_world_size())
    owners = [row["owners"] for row in optimizer.report(show=False) if row["path"] == "conda"]
    return _whole(model), owners


@pytest.mark.parametrize("shared", [False, True])
def test_ddp(shared: bool, one_process: dict[str, Tensor]) -> None:
    (first, owners), *others = ranks.run(3, _ddp, shared)
    assert _distance(first, one_process) < 1e-3
    for whole, _ in others:
        assert all(torch.equal(whole[name], first[name]) for name in first)
    dealt = {owner for owners_of_weight in owners for owner in owners_of_weight}
    assert dealt == ({0, 1, 2} if shared else {0})


def _drift() -> list[Tensor]:
    """DDP whose gradients differ in the last bit, as of a non-deterministic kernel."""
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(12, 8))
    optimizer = Conda(
        [{"params": [param], "algorithm": "conda"}],
        update_proj_gap=1,
        process_group=dist.group.WORLD,
    )
    for step in range(4):
        param.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        param.grad *= 1 + dist.get_rank() * 2**-22
        optimizer.step()
    return [optimizer.state[param]["basis"].clone()]


def test_shared_refreshes_keep_bases_equal() -> None:
    first, second = ranks.run(2, _drift)
    assert torch.equal(first[0], second[0])


def _hsdp_replicas() -> tuple[list[Tensor], list[Tensor]]:
    model = _llama()
    mesh = _mesh(2, 2)
    _shard(model, mesh)
    optimizer = Conda(param_groups(model), **SETTINGS)
    _train(model, optimizer, dist.get_rank(), 4)
    params = [p.to_local().detach().clone() for p in model.parameters()]
    states = [
        (value.to_local() if isinstance(value, DTensor) else value).clone()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return params, states


@pytest.mark.thorough
def test_replicas_are_bit_identical_and_runs_repeatable() -> None:
    first, again = ranks.run(4, _hsdp_replicas), ranks.run(4, _hsdp_replicas)
    for a, b in [(0, 2), (1, 3)]:  # the two replicas of each shard
        for ours, theirs in zip(first[a], first[b], strict=True):
            assert all(map(torch.equal, ours, theirs))
    for ours, theirs in zip(first, again, strict=True):
        assert all(map(torch.equal, ours[0] + ours[1], theirs[0] + theirs[1]))


class _Experts(nn.Module):
    """A batch of five matrices in one weight, tall and wide, dealt to ranks as experts are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(5, 10, 6) / 3)
        self.down = nn.Parameter(torch.randn(5, 6, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi,eio->bei", x, self.up, self.down).tanh()


def _experts(world: int, separate: bool) -> dict[str, Tensor]:
    model = _Experts()
    pieces: dict[str, nn.Parameter] = {}
    if separate:
        pieces = {
            f"{name}.{e}": nn.Parameter(weight[e].detach().clone())
            for name, weight in model.named_parameters()
            for e in range(5)
        }
        optimizer: torch.optim.Optimizer = ReferenceConda(pieces.values(), **SETTINGS)
    else:
        fully_shard(model, mesh=_mesh(world))
        optimizer = Conda(
            [{"params": list(model.named_parameters()), "algorithm": "conda"}], **SETTINGS
        )
    for step in range(STEPS):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(step))
        for name, weight in model.named_parameters():
            for e in range(5):
                if separate:
                    weight.data[e] = pieces[f"{name}.{e}"].data
        (model(x) - 1).pow(2).mean().backward()
        for name, weight in model.named_parameters():
            for e in range(5):
                if separate:
                    pieces[f"{name}.{e}"].grad = weight.grad[e].clone()
        optimizer.step()
        model.zero_grad()
    for key, piece in pieces.items():
        name, e = key.split(".")
        getattr(model, name).data[int(e)] = piece.data
    return _whole(model)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_experts_are_matrices_of_their_own(world: int) -> None:
    expected = ranks.run(1, _experts, 1, True)[0]
    start = _whole(_Experts())
    for whole in ranks.run(world, _experts, world, False):
        for name in expected:
            moved = (expected[name] - start[name]).norm()
            assert (whole[name] - expected[name]).norm() / moved < 1e-4


def _bf16(world: int) -> tuple[list[torch.dtype], dict[str, Tensor]]:
    model = _llama().to(torch.bfloat16)
    _shard(model, _mesh(world))
    optimizer = Conda(param_groups(model), **SETTINGS)
    _train(model, optimizer, dist.get_rank(), world)
    dtypes = [v.dtype for state in optimizer.state.values() for v in state.values()]
    return dtypes, _whole(model)


def test_bfloat16_parameters_have_float32_state() -> None:
    (_, alone), *_ = ranks.run(1, _bf16, 1)
    for dtypes, whole in ranks.run(2, _bf16, 2):
        assert set(dtypes) == {torch.float32}
        # Gradients are reduced in bfloat16, so two ranks and one differ by its rounding.
        assert _distance(whole, alone) < 0.2


def _mixed(world: int) -> float:
    model = _llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _shard(model, _mesh(world), mp_policy=policy)
    optimizer = Conda(param_groups(model), lr=2e-2, update_proj_gap=GAP)
    losses = []
    for _ in range(25):
        loss = _loss(model, 0, dist.get_rank(), world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / world)
    return losses[-1] / losses[0]


def test_mixed_precision_trains() -> None:
    assert max(ranks.run(2, _mixed, 2)) < 0.5


def _grad_scaler() -> tuple[float, float]:
    """FSDP2 with a scaler: an overflow on one rank skips the step on all."""
    model = _llama()
    _shard(model, _mesh(2))
    optimizer = Conda(param_groups(model), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    before = copy.deepcopy(_whole(model))
    moved = []
    for step in range(2):
        scaler.scale(_loss(model, step, dist.get_rank(), 2)).backward()
        if step == 0 and dist.get_rank() == 0:
            next(iter(model.parameters())).grad.to_local().fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = _whole(model)
        moved.append(max((after[n] - before[n]).abs().max().item() for n in after))
    return moved[0], moved[1]


def test_grad_scaler() -> None:
    for skipped, taken in ranks.run(2, _grad_scaler):
        assert skipped == 0
        assert 0 < taken < 1


def _offloaded(device: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters and states on this rank after steps of shards on the CPU, as with CPU offload.

    Args:
        device: the mesh's; its group is gloo's, which carries what is on the CPU.
        options: Conda's.
    """
    mesh = DeviceMesh.from_group(dist.group.WORLD, device)
    cpu = DeviceMesh.from_group(dist.group.WORLD, "cpu")

    def shards(whole: Tensor) -> DTensor:  # the way fully_shard makes them
        sharded = distribute_tensor(whole, cpu, [Shard(0)], src_data_rank=None)
        spec = DTensorSpec(mesh, sharded.placements, sharded._spec.tensor_meta)
        return _from_local_no_grad(sharded.to_local(), spec)

    torch.manual_seed(0)
    named = {
        name: nn.Parameter(shards(param.detach())) for name, param in _llama().named_parameters()
    }
    optimizer = Conda(named.items(), **SETTINGS, **options)
    for _ in range(STEPS):
        for param in named.values():
            param.grad = shards(torch.randn(param.shape))
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    found = {name: param.to_local() for name, param in named.items()}
    for name, param in named.items():
        for key, value in optimizer.state[param].items():
            found[f"{name}:{key}"] = value.to_local() if isinstance(value, DTensor) else value
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0}], ids=str)
def test_state_stays_on_the_cpu_with_its_parameter(options: dict[str, Any]) -> None:
    """The mesh of offloaded parameters is one of GPUs, which are not touched: here are none."""
    for ours, theirs in zip(
        ranks.run(2, _offloaded, "cuda", options),
        ranks.run(2, _offloaded, "cpu", options),
        strict=True,
    ):
        assert len(ours) > 40
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
