"""Diagnostics: right by their definitions, the same on all layouts, and free where none are due."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import ranks
import rule_runs
import toys
from conda_dist import Conda, Muon
from conda_dist.reference import decompose, project
from models import FSDP2, PLAIN, Layout
from parallel import BATCHES, DENSE, EXPERTS, MATRICES
from traffic import Call, recorded

EVERY, STEPS = 2, 6
WITHIN = {"rel": 2e-4, "abs": 1e-6}
"""Of signals on shards and in one process: both round float32 moments."""
LAYOUTS: list[Layout] = [FSDP2, ("hsdp", (2, 2)), ("grid", (2, 2)), ("ddp", (2,))]


def _alike(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, signals in theirs.items():
        for key, value in signals.items():
            close = pytest.approx(value, **WITHIN) if isinstance(value, float) else value
            assert ours[name][key] == close, (name, key)


def _collect(layout: Layout, options: dict[str, Any]) -> list[Any]:
    model, optimizer = models.build(layout, diagnostics_every=EVERY, **options)
    models.train(model, optimizer, range(STEPS))
    with recorded() as calls:
        found = [optimizer.diagnostics(), optimizer.diagnostics(summed=True)]
    assert not calls
    return found


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0}, {"refresh_delay": 1}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_on_every_layout(layout: Layout, options: dict[str, Any]) -> None:
    expected = _collect(PLAIN, options)
    assert {s["step"] for s in expected[0].values()} == {STEPS}
    for found in ranks.run(math.prod(layout[1]), _collect, layout, options):
        for ours, theirs in zip(found, expected, strict=True):
            _alike(ours, theirs)


def _matrices(shapes: dict[str, tuple[int, ...]], layouts: Any, optimizer: Any) -> list[Any]:
    found = []
    for layout in layouts:
        params = rule_runs.parameters(shapes, layout)
        group = {"params": list(params.items()), "algorithm": optimizer.__name__.lower()}
        given = {"update_proj_gap": 2} if optimizer is Conda else {}
        made = optimizer([group], lr=0.02, weight_decay=0.1, diagnostics_every=EVERY, **given)
        rule_runs.train(params, made, range(STEPS))
        found.append(made.diagnostics())
    return found


@pytest.mark.parametrize("optimizer", [Conda, Muon])
@pytest.mark.parametrize(("shapes", "layouts"), [(MATRICES, DENSE), (EXPERTS, BATCHES)])
def test_the_same_in_every_placement(shapes: Any, layouts: Any, optimizer: Any) -> None:
    (expected,) = _matrices(shapes, [None], optimizer)
    for world in (3, 4):  # columns; rows, HSDP, and FSDP over tensor parallelism
        mine = [at for at in layouts if math.prod(at[0]) == world]
        assert mine
        for rank in ranks.run(world, _matrices, shapes, mine, optimizer):
            for found in rank:
                _alike(found, expected)


def _off_diagonal(momentum: Tensor, basis: Tensor) -> tuple[float, float]:
    """Staleness and effective rank by their definitions, in float64."""
    gram = (
        basis.mT @ (momentum.mT @ momentum if _tall(momentum) else momentum @ momentum.mT) @ basis
    )
    values = torch.linalg.svdvals(momentum).square()
    off = gram - gram.diag().diag()
    return float((off.norm() / gram.norm()) ** 2), float(values.sum() ** 2 / values.square().sum())


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[0] >= matrix.shape[1]


def test_each_is_what_it_says() -> None:
    params = toys.parameters()
    grads = toys.gradients(params, 5)
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    groups = [{"params": named[:2], "algorithm": "conda"}, {"params": named[2:]}]
    optimizer = Conda(groups, **{**toys.OPTIONS, "weight_decay": 0.5}, diagnostics_every=5)
    before, after = toys.take(optimizer, params, grads)[-2:]
    found = optimizer.diagnostics()
    for i, (was, now) in enumerate(zip(before, after, strict=True)):
        signals = found[f"p{i}"]
        momenta = [torch.zeros(was.shape, dtype=torch.float64)]
        for row in grads:
            momenta.append(0.9 * momenta[-1] + 0.1 * row[i].double())
        assert signals["update_ratio"] == pytest.approx(
            float((now - was).norm() / now.norm()), 1e-5
        )
        assert signals["gradient_norm"] == pytest.approx(float(grads[-1][i].norm()), 1e-5)
        assert signals["momentum_norm"] == pytest.approx(float(momenta[-1].norm()), 1e-5)
        if i < 2:  # refreshed in steps 1 and 4
            (basis,) = (of_side for of_side in decompose(momenta[1]) if of_side is not None)
            expected = _off_diagonal(momenta[4], basis)
            assert (signals["staleness"], signals["effective_rank"]) == pytest.approx(
                expected, 1e-4
            )
            assert signals["steps_since_refresh"] == 1
            assert project(momenta[4], *decompose(momenta[1])).shape == was.shape
    assert (found["p2"]["path"], found["p2"]["staleness"]) == ("adamw", None)
    summed = optimizer.diagnostics(summed=True)
    assert summed["conda"]["gradient_norm"] == pytest.approx(
        math.hypot(found["p0"]["gradient_norm"], found["p1"]["gradient_norm"])
    )
    assert summed["adamw"] == found["p2"]


def _traffic(layout: Layout, options: dict[str, Any], every: int) -> list[list[Call]]:
    model, optimizer = models.build(layout, diagnostics_every=every, **options)
    found = []
    for step in range(STEPS):
        with recorded() as calls:
            models.train(model, optimizer, [step])
        found.append(list(calls))
    return found


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_only_steps_that_collect_send_anything(layout: Layout, options: dict[str, Any]) -> None:
    world = math.prod(layout[1])
    without, with_them = (
        ranks.run(world, _traffic, layout, options, every) for every in (0, EVERY)
    )
    for theirs, ours in zip(without, with_them, strict=True):
        for step, (a, b) in enumerate(zip(theirs, ours, strict=True), start=1):
            names = [[call.name for call in calls] for calls in (a, b)]
            added = ["all_reduce"] * len(layout[1]) if step % EVERY == 0 else []
            assert names[1] == names[0] + added
            if step % models.GAP != 1 and not added:  # bytes, too, where nothing is refreshed
                assert a == b


def test_collecting_changes_no_bit() -> None:
    model, optimizer = models.build(PLAIN, diagnostics_every=1)
    other, without = models.build(PLAIN)
    models.train(model, optimizer, range(STEPS))
    models.train(other, without, range(STEPS))
    ours, theirs = (models.snapshot(*pair) for pair in ((model, optimizer), (other, without)))
    assert not models.unequal(ours, theirs)
    assert not without.diagnostics()


def test_they_are_no_state_and_keep_the_count_of_steps() -> None:
    model, optimizer = models.build(PLAIN, diagnostics_every=3)
    models.train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    assert {s["step"] for s in optimizer.diagnostics().values()} == {3}
    optimizer.load_state_dict(state)
    assert not optimizer.diagnostics()
    models.train(model, optimizer, [4])
    assert not optimizer.diagnostics()
    models.train(model, optimizer, [5])  # the sixth step
    summed = optimizer.diagnostics(summed=True)
    assert {path: s["step"] for path, s in summed.items()} == {"conda": 6, "adamw": 6}
    assert summed["conda"]["steps_since_refresh"] == 2  # of which the state knows
    assert summed["conda"]["staleness"] is None


def test_what_has_no_gradient_is_left_out() -> None:
    params = toys.parameters((6, 4), (3, 5))
    optimizer = Conda([{"params": params, "algorithm": "conda"}], diagnostics_every=1)
    (first,) = toys.gradients(params, 1)
    toys.take(optimizer, params, [first])
    assert len(optimizer.diagnostics()) == 2
    toys.take(optimizer, params, [[first[0], None]])
    (signals,) = optimizer.diagnostics().values()
    assert signals["step"] == 2


def test_parts_are_measured_apart() -> None:
    (param,) = toys.parameters((12, 4))
    group = {"params": [("qkv", param)], "algorithm": "conda", "splits": (4, 8)}
    optimizer = Conda([group], diagnostics_every=1, weight_decay=0.1)
    (grads,) = toys.gradients([param], 1)
    toys.take(optimizer, [param], [grads])
    found = optimizer.diagnostics()
    assert list(found) == [row["name"] for row in optimizer.report(show=False)]
    norms = [signals["gradient_norm"] for signals in found.values()]
    assert norms == pytest.approx([float(g.norm()) for g in grads[0].split((4, 8))])
    whole = optimizer.diagnostics(summed=True)["conda"]
    assert whole["gradient_norm"] == pytest.approx(float(grads[0].norm()))
