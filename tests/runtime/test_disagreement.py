"""Ranks that disagree, and parameters or gradients that cannot be taken: an error on all."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import models
import ranks
from conda_dist import Conda
from models import Layout

Named = list[tuple[str, nn.Parameter]]


def _group(named: Named, **options: Any) -> dict[str, Any]:
    return {"params": named, "algorithm": "conda", **options}


def _matrices(layout: Layout, count: int = 4) -> Named:
    """Weights of one shape, but for the last."""
    shapes = [(6, 4)] * (count - 1) + [(4, 9)]
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in shapes]
    if layout[0] == "ddp":
        return [(f"w{i}", nn.Parameter(w)) for i, w in enumerate(whole)]
    mesh = init_device_mesh("cpu", layout[1])
    places = [Replicate(), Shard(0)][-len(layout[1]) :]
    example = DTensor.from_local(torch.zeros(1), mesh, places, run_check=False)
    return [(f"w{i}", nn.Parameter(models.like(example, w))) for i, w in enumerate(whole)]


def _swap(named: Named) -> Named:
    return [named[1], named[0], *named[2:]]


def _of_dtype(named: Named) -> Named:
    return [*named[:-1], ("w3", nn.Parameter(named[-1][1].detach().double()))]


def _of_shape(named: Named) -> Named:
    """Another global shape behind the same local one, where there are shards."""
    param = named[-1][1].detach()
    if not isinstance(param, DTensor):
        return [*named[:-1], ("w3", nn.Parameter(torch.zeros(4, 8)))]
    local = torch.zeros(2, 8)
    mesh = param.device_mesh
    return [*named[:-1], ("w3", nn.Parameter(_from_local(local, mesh, param.placements, (4, 8))))]


def _of_placement(named: Named) -> Named:
    param = named[0][1].detach()
    if not isinstance(param, DTensor):
        return named[1:] + named[:1]
    places = [*param.placements[:-1], Shard(1)]
    local = torch.zeros(6, 2)
    return [("w0", nn.Parameter(_from_local(local, param.device_mesh, places, (6, 4)))), *named[1:]]


def _from_local(local: torch.Tensor, mesh: Any, places: Any, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _frozen(named: Named) -> Named:
    named[2][1].requires_grad_(False)
    return named


DIFFERENCES: dict[str, tuple[Callable[[Named], list[dict[str, Any]]], dict[str, Any]]] = {
    "order": (lambda n: [_group(_swap(n))], {}),
    "one missing": (lambda n: [_group(n[:-1])], {}),
    "one frozen": (lambda n: [_group(_frozen(n))], {}),
    "gap": (lambda n: [_group(n, update_proj_gap=7)], {}),
    "gap of one": (lambda n: [_group(n[:-1]), _group(n[-1:], update_proj_gap=7)], {}),
    "path": (lambda n: [_group(n[:-1]), {"params": n[-1:], "algorithm": "adamw"}], {}),
    "names": (lambda n: [_group([(f"x.{name}", p) for name, p in n])], {}),
    "dtype": (lambda n: [_group(_of_dtype(n))], {}),
    "shape": (lambda n: [_group(_of_shape(n))], {}),
    "placement": (lambda n: [_group(_of_placement(n))], {}),
    "basis placement": (lambda n: [_group(n)], {"basis_budget": 0}),
    "buckets": (lambda n: [_group(n)], {"buffer_bytes": 1}),
    "state dtype": (lambda n: [_group(n)], {"state_dtype": torch.float64}),
}
"""What the last rank does otherwise than the others."""


def _disagree(layout: Layout) -> dict[str, tuple[str, float, list[str]]]:
    """For each difference what was said, after how long, and what had been done by then."""
    answers = {}
    sent: list[str] = []
    exchange = dist.all_to_all_single

    def watched(*args: Any, **kwargs: Any) -> Any:
        sent.append("an exchange was started")
        return exchange(*args, **kwargs)

    dist.all_to_all_single = watched
    try:
        for case, (groups, options) in DIFFERENCES.items():
            named = _matrices(layout)
            mine: list[dict[str, Any]] = [_group(named)]
            if dist.get_rank() == dist.get_world_size() - 1:
                mine = groups(named)
            else:
                options = {}
            if layout[0] == "ddp":
                options = {**options, "process_group": dist.group.WORLD}
            optimizer = Conda(mine, **options)
            params = [p for g in optimizer.param_groups for p in g["params"]]
            before = [models.local(p) for p in params]
            for param in params:
                param.grad = torch.ones_like(param) if param.requires_grad else None
            sent.clear()
            begun = time.monotonic()
            said = models.attempt(optimizer.step)
            took = time.monotonic() - begun
            done = list(dict.fromkeys(sent))
            if any(
                not torch.equal(models.local(p), b) for p, b in zip(params, before, strict=True)
            ):
                done.append("a parameter was changed")
            if any(optimizer.state.values()):
                done.append("states were made")
            answers[case] = said, took, done
    finally:
        dist.all_to_all_single = exchange
    return answers


@pytest.mark.parametrize(
    "layout", [("fsdp", (2,)), ("fsdp", (3,)), ("ddp", (2,)), ("hsdp", (2, 2))], ids=str
)
def test_plans_that_differ(layout: Layout) -> None:
    world = torch.Size(layout[1]).numel()
    for rank, answers in enumerate(ranks.run(world, _disagree, layout, timeout=60)):
        for case, (said, took, done) in answers.items():
            assert said.startswith("RuntimeError"), (case, said)
            # A rank that cannot make a plan at all says why; the others pass it on.
            differs = "rank 0 has" in said and f"rank {world - 1} has" in said
            assert differs or f"rank {world - 1}: ValueError" in said, (case, rank, said)
            assert not done, case
            assert took < 10, case


def _unplannable(layout: Layout, who: list[int]) -> tuple[str, str]:
    """Some ranks have a placement that no optimizer can update."""
    named = _matrices(layout)
    if dist.get_rank() in who:
        param = named[1][1].detach()
        assert isinstance(param, DTensor)
        places = [*param.placements[:-1], Partial()]
        broken = _from_local(torch.zeros(6, 4), param.device_mesh, places, (6, 4))
        named[1] = ("w1", nn.Parameter(broken))
    optimizer = Conda([_group(named)])
    for _, param in named:
        param.grad = torch.ones_like(param.detach())
    reported = "nothing was raised"
    if len(who) > 1:
        reported = models.attempt(lambda: optimizer.report(show=False))
    return models.attempt(optimizer.step), reported


@pytest.mark.parametrize("layout", [("fsdp", (2,)), ("fsdp", (3,)), ("hsdp", (2, 2))], ids=str)
def test_a_placement_that_cannot_be_updated(layout: Layout) -> None:
    world = torch.Size(layout[1]).numel()
    for who in ([world - 1], list(range(world))):
        for said, reported in ranks.run(world, _unplannable, layout, who, timeout=30):
            assert "w1: placement" in said
            assert "Partial" in said
            assert "redistribute" in said
            if len(who) > 1:
                assert "w1: placement" in reported


def _two_meshes(shapes: list[tuple[int, ...]]) -> str:
    """Two meshes with groups of their own, as of dense and expert weights, met in any order."""
    torch.manual_seed(0)
    named = []
    for i, shape in enumerate(shapes):
        if len(shape) == 1:
            mesh = DeviceMesh.from_group(dist.new_group([0, 1]), "cpu", mesh_dim_names=(f"d{i}",))
        else:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("shard", "more"))
        places = [Shard(0), Replicate()][: mesh.ndim]
        example = DTensor.from_local(torch.zeros(1), mesh, places, run_check=False)
        named.append((f"w{i}", nn.Parameter(models.like(example, torch.randn(4, 9)))))
    alone = [(name, nn.Parameter(models.whole(param))) for name, param in named]
    expected = Conda([_group(alone)], update_proj_gap=2)
    optimizer = Conda([_group(named[::-1] if dist.get_rank() else named)], update_proj_gap=2)
    for step in range(3):
        for name, param in named + alone:
            param.grad = models.gradient(name, param, step)
        expected.step()
        if (said := models.attempt(optimizer.step)) != "nothing was raised":
            return said
    for (_, ours), (name, theirs) in zip(named, alone, strict=True):
        torch.testing.assert_close(models.whole(ours), theirs.detach(), msg=name)
    return "nothing was raised"


@pytest.mark.parametrize("shapes", [[(2,), (2,)], [(2,), (2, 1)]], ids=str)
def test_two_meshes_in_another_order_do_not_hang(shapes: list[tuple[int, ...]]) -> None:
    """Either the ranks find out, or they use the meshes in an order of their own."""
    said = ranks.run(2, _two_meshes, shapes, timeout=15)
    assert said[0] == said[1]
    assert said[0] == "nothing was raised" or "differs" in said[0]


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, sparse=True)
        self.up = nn.Linear(4, 6, bias=False)


def _sparse(group: bool) -> tuple[str, bool]:
    torch.manual_seed(0)
    model = _Sparse()
    options = {"process_group": dist.group.WORLD} if group else {}
    optimizer = Conda(model.named_parameters(), **options)
    before = models.snapshot(model, optimizer)
    model.up(model.embed(torch.tensor([1, 2]))).sum().backward()
    said = models.attempt(optimizer.step)
    now = models.snapshot(model, optimizer)
    return said, not models.unequal({k: now[k] for k in before}, before)


def test_sparse_gradients() -> None:
    for said, unchanged in [_sparse(False), *ranks.run(2, _sparse, True, timeout=60)]:
        assert said.startswith("RuntimeError: embed.weight")
        assert "sparse=False" in said
        assert unchanged


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(4, 4, dtype=torch.complex64), "view_as_real"),
        (torch.zeros(4, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, 4).to_sparse(), "torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("algorithm", ["conda", "adamw"])
def test_parameters_that_cannot_be_optimized(
    tensor: torch.Tensor, said: str, algorithm: str
) -> None:
    param = nn.Parameter(tensor, requires_grad=tensor.dtype != torch.int64)
    good = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=said) as caught:
        Conda([{"params": [("good", good), ("bad", param)], "algorithm": algorithm}])
    assert "bad" in str(caught.value)


def _resharded(who: list[int]) -> str:
    """A state is not where its parameter is, on some ranks."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    example = DTensor.from_local(torch.zeros(1), mesh, [Shard(0)], run_check=False)
    param = nn.Parameter(models.like(example, torch.randn(8, 4)))
    optimizer = Conda([_group([("w", param)])])
    param.grad = models.like(example, torch.ones(8, 4))
    optimizer.step()
    if dist.get_rank() in who:
        optimizer.state[param]["exp_avg"] = torch.zeros(8, 4)
    later = nn.Parameter(models.like(example, torch.randn(8, 4)))
    optimizer.add_param_group(_group([("later", later)]))
    return models.attempt(optimizer.step)


@pytest.mark.parametrize("who", [[1], [0, 1]], ids=str)
def test_a_state_of_another_layout(who: list[int]) -> None:
    for said in ranks.run(2, _resharded, who, timeout=20):
        assert "w: rank 1 holds (8, 4) of its exp_avg, but should hold (4, 4)" in said
        assert "resharded" in said


def _overlapping() -> list[str]:
    """Dense weights on all ranks, experts on pairs of them, as under expert parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
    world = init_device_mesh("cpu", (4,), mesh_dim_names=("dense",))
    torch.manual_seed(0)
    named = []
    alone = []
    for i in range(3):
        for name, on in ((f"dense{i}", world), (f"expert{i}", mesh["fsdp"])):
            whole = torch.randn((6, 9) if on is world else (12, 18))
            if on is not world:  # another expert on each pair
                whole = whole + mesh.get_local_rank("ep")
            example = DTensor.from_local(torch.zeros(1), on, [Shard(0)], run_check=False)
            named.append((name, nn.Parameter(models.like(example, whole))))
            alone.append((name, nn.Parameter(whole)))
    if mesh.get_local_rank("ep"):  # as many experts are not everywhere
        del named[-1], alone[-1]
    settings = {"update_proj_gap": 2, "basis_budget": 2000}
    optimizer, expected = Conda([_group(named)], **settings), Conda([_group(alone)], **settings)
    for step in range(4):
        for name, param in named + alone:
            param.grad = models.gradient(name, param, step)
        expected.step()
        if (said := models.attempt(optimizer.step)) != "nothing was raised":
            return [said]
    return [
        name
        for (name, ours), (_, theirs) in zip(named, alone, strict=True)
        if not torch.allclose(models.whole(ours), theirs.detach(), atol=1e-4)
    ]


def test_meshes_inside_meshes() -> None:
    """Owners and basis placements on a mesh depend on nothing that only some of its ranks know."""
    for problems in ranks.run(4, _overlapping, timeout=30):
        assert not problems
