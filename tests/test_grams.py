"""Gram matrices summed up by owners: parts, what they make, and when they are sent."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import models
import ranks
import toys
from conda_dist import Conda, refresh
from conda_dist.decomposition import Outcome, decompose, decompose_sum, gram_part, pack, unpack
from conda_dist.flat import Flat
from conda_dist.layout import Layout, Split, Topology
from conda_dist.owners import deal_owners
from conda_dist.plan import plan_weight
from conda_dist.waves import packed_numel, plan_wave, sums_grams
from test_parallel_layouts import far, train
from traffic import recorded

MATRICES = {"tall": (61, 5), "wide": (6, 64), "short": (2, 29), "square": (7, 7)}
"""All but the last are summed up on two ranks and on four, in float64, too."""
EXPERTS = {"up": (3, 47, 4), "down": (3, 4, 47), "even": (4, 40, 6), "one": (1, 5, 48)}
METHODS = ["orthogonal_iteration", "eigh64"]
S0, S1, ALL = Shard(0), Shard(1), Replicate()


@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_a_symmetric_matrix_is_what_was_packed(r: int) -> None:
    matrix = toys.random(r, r)
    symmetric = matrix + matrix.mT
    packed = pack(symmetric)
    assert packed.numel() + 1 == packed_numel(r)
    assert packed.numel() <= r * (r + 1) / 2 + r % 2 * (r + 1)
    assert torch.equal(unpack(packed, r), symmetric)


def _sum(shards: list[Tensor], right: bool, method: str) -> tuple[Outcome, Tensor | None]:
    parts = torch.cat([gram_part(shard, right, method) for shard in shards])
    return decompose_sum(parts, shards[0].shape[1 if right else 0], method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "scales", [(1, 1, 1), (1e30, 1e30, 1e30), (1e-30, 1e-30, 0), (1, 1e-25, 2)]
)
def test_parts_make_what_the_whole_makes(
    dtype: torch.dtype, method: str, scales: tuple[float, ...]
) -> None:
    for rows in ((9, 2, 6), (17, 0, 0)):
        whole = toys.random(sum(rows), 7) * 2.0 ** -torch.arange(7)
        shards = [s * f for s, f in zip(whole.split(rows), scales, strict=True)]
        momentum = torch.cat(shards).to(dtype)
        expected = decompose(momentum, True, method)
        for right in (True, False):
            given = [s if right else s.mT for s in momentum.split(rows)]
            outcome, rotation = _sum(given, right, method)
            assert outcome == expected[0] == Outcome.DONE
            assert rotation is not None
            assert expected[1] is not None
            # Eigenvectors have free signs.
            overlap = (rotation.double().mT @ expected[1].double()).abs()
            torch.testing.assert_close(overlap, torch.eye(7).double(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_what_has_no_basis(method: str) -> None:
    zero, some = torch.zeros(4, 3), toys.random(4, 3)
    assert _sum([zero, zero], True, method) == (Outcome.ZERO, None)
    assert _sum([zero, some], True, method)[0] == Outcome.DONE
    for wrong in (math.nan, math.inf, -math.inf):
        broken = toys.random(4, 3)
        broken[1, 2] = wrong
        assert _sum([some, broken], True, method) == (Outcome.NOT_FINITE, None)


def test_parts_are_sent_where_they_are_fewer_bytes() -> None:
    def sums(shape: tuple[int, int], count: int, gram: int = 4) -> bool:
        topology = Topology((count,), tuple(range(count)))
        layout = Layout(shape, (count,), (Split(0),))
        (plan,) = deal_owners([plan_weight("w", topology, layout, False)])
        return sums_grams(plan, 4, gram)

    assert not sums((512, 512), 2)
    assert sums((1376, 512), 5)  # 2 x 1376 / 512 = 5.4
    assert not sums((1376, 512), 6)
    assert sums((512, 1376), 2, gram=8)
    assert not sums((512, 1376), 3, gram=8)
    assert not sums((1376, 512), 1)
    assert sums((2**20, 64), 64)


@pytest.mark.parametrize("shape", [(1376, 512), (512, 1376)])
def test_ranks_that_hold_nothing_have_no_part(shape: tuple[int, int]) -> None:
    """Of eight in flat partitions two hold some of the weight."""
    size = math.prod(shape)
    flat = Flat.of(shape, (0, 0, 0, size // 3, *[size] * 5))
    (plan,) = deal_owners([plan_weight("w", Topology((8,), tuple(range(8))), flat, False)])
    assert sums_grams(plan, 4, 4)
    wave = [plan_wave([plan], (0,), [(0,)], (rank,), summed=[(0,)]) for rank in range(8)]
    assert [w.matrices[0].gives for w in wave] == [False, False, True, True, *[False] * 4]
    sent = [sum(hop.sent(rank, 0) for hop in w.gather) for rank, w in enumerate(wave)]
    assert sum(sent) == packed_numel(512)
    assert wave[plan.owners[0][0]].gather[-1].transfers[0].shape == (2, packed_numel(512))


@pytest.mark.parametrize(
    "layout", [((2,), [S0]), ((2,), [S1]), ((2, 2), [ALL, S0]), ((2, 2), [S0, S1])], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {"refresh_method": "orthogonal_iteration"},
        {"refresh_method": "orthogonal_iteration", "basis_placement": "shard", "refresh_bytes": 1},
        {"refresh_method": "eigh64"},
    ],
    ids=str,
)
def test_follows_one_process(layout: Any, options: dict[str, Any]) -> None:
    for shapes in (MATRICES, EXPERTS):
        alone = train(None, shapes, {"refresh_method": options["refresh_method"]})
        world = torch.Size(layout[0]).numel()
        runs = ranks.run(world, _train_counted, layout, shapes, options)
        for ended, _ in runs:
            assert far(ended, alone) < 1e-5
        made = sum(count for _, count in runs)
        if shapes is MATRICES:  # three in two refreshes after the first, by two ranks or four
            assert made == 3 * 2 * (4 if layout[1] == [S0, S1] else 2)
        else:  # whole experts are dealt out where the first dimension is split
            assert bool(made) is (S1 in layout[1])


def _train_counted(layout: Any, shapes: Any, options: dict[str, Any]) -> tuple[Any, int]:
    """Also how many parts this rank has made."""
    made, plain = [0], refresh.gram_part

    def counted(*args: Any) -> Tensor:
        made[0] += 1
        return plain(*args)

    refresh.gram_part = counted  # type: ignore[assignment]
    try:
        return train(layout, shapes, options), made[0]
    finally:
        refresh.gram_part = plain


LONG = {"tall": (40, 8), "wide": (8, 40), "square": (16, 16)}


def _optimizer(mesh_shape: tuple[int, ...], places: list[Any], **options: Any) -> Conda:
    mesh, params = init_device_mesh("cpu", mesh_shape), []
    example = DTensor.from_local(torch.zeros(1), mesh, [ALL] * mesh.ndim, run_check=False)
    for i, (name, shape) in enumerate(LONG.items()):
        values = (toys.random(*shape, seed=10 * i + j) for j in range(2))
        param, grad = (models.like(example, x).redistribute(mesh, places) for x in values)
        params.append((name, nn.Parameter(param)))
        params[-1][1].grad = grad
    return Conda([{"params": params, "algorithm": "conda"}], update_proj_gap=2, **options)


def _measure(
    mesh_shape: tuple[int, ...], places: list[Any], steps: int, options: dict[str, Any]
) -> tuple[int, int, int]:
    """Bytes sent in a refresh that is not the first, those planned, and those by momenta."""
    optimizer = _optimizer(mesh_shape, places, **options)
    rows = optimizer.report(show=False)
    usual = _optimizer(mesh_shape, places, **{**options, "refresh_method": "svd"})
    for _ in range(2):
        optimizer.step()
    with recorded() as calls:
        for _ in range(steps):
            optimizer.step()
    sent = sum(call.sent for call in calls if call.name == "all_to_all")
    steady = sum(row["step_bytes"] for row in rows) * (steps - 1)
    planned = sum(row["refresh_bytes"] for row in rows) + steady
    momenta = sum(row["refresh_bytes"] for row in usual.report(show=False)) + steady
    return sent, planned, momenta


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refresh", ["sync", "async"])
@pytest.mark.parametrize("layout", [((2,), [S0]), ((2, 2), [ALL, S0]), ((4,), [S1])], ids=str)
def test_traffic_is_what_the_report_says(method: str, refresh: str, layout: Any) -> None:
    """And over all ranks less than momenta would be, by what two weights of three save."""
    options = {"refresh_method": method, "refresh": refresh, "refresh_delay": 1}
    steps = 2 if refresh == "async" else 1
    answers = ranks.run(torch.Size(layout[0]).numel(), _measure, *layout, steps, options)
    for sent, planned, _ in answers:
        assert sent == planned
    parts, size = layout[0][-1], 8 if method == "eigh64" else 4
    saved = 2 * max(0, (parts - 1) * (40 * 8 * 4 // parts - packed_numel(8) * size))
    assert sum(momenta - sent for sent, _, momenta in answers) == saved
    assert saved or (method, parts) == ("eigh64", 4)


def _raise(options: dict[str, Any]) -> None:
    optimizer = _optimizer((2,), [S0], **options)
    optimizer.step()
    plain = refresh.gram_part

    def broken(*args: Any) -> Tensor:
        raise MemoryError("no room")

    if torch.distributed.get_rank() == 1:
        refresh.gram_part = broken
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        refresh.gram_part = plain


@pytest.mark.parametrize("options", [{}, {"refresh": "async", "refresh_delay": 1}], ids=str)
def test_a_rank_that_cannot_make_its_part_tells_all(options: dict[str, Any]) -> None:
    options = {**options, "refresh_method": "orthogonal_iteration"}
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(2, _raise, options)
    said = "rank 1: MemoryError: no room (while decomposing the momentum of"
    assert str(caught.value).count(f"Conda could not refresh its bases: {said}") == 2


def _fail(steps: int) -> str:
    optimizer = _optimizer((2,), [S0], refresh_method="orthogonal_iteration")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        if step == 2 and torch.distributed.get_rank() == 1:
            params[0].grad.to_local()[1, 3] = math.nan
        optimizer.step()
    return str(optimizer.state[params[0]]["basis_step"])


def test_a_part_that_is_not_finite_is_the_matrixs_failure() -> None:
    said = ranks.run(2, _fail, 3)
    assert said == ["tensor(0.)"] * 2
    with pytest.raises(ranks.RankError, match="tall: the basis could not be refreshed at step 4"):
        ranks.run(2, _fail, 7)
