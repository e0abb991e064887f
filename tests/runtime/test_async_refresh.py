"""Refreshes in the background: the lag is exact, on shards and across a stop."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

import models
import ranks
import toys
from conda_dist import Conda
from conda_dist.numerics import decomposition
from conda_dist.reference import decompose, project, project_back
from models import FSDP2, PLAIN, Layout
from parallel import MATRICES, far, train

ASYNC = {"refresh_delay": 2}
LAYOUTS: list[Layout] = [("fsdp", (3,)), ("hsdp", (2, 2)), ("grid", (2, 2)), ("ddp", (2,))]
STEPS = 13
BETA1, BETA2, LR, SCALE, EPS = 0.9, 0.99, 1e-2, 0.25, 1e-8


def _late(param: Tensor, grads: list[Tensor], gap: int, delay: int, phase: int) -> list[Tensor]:
    """The paper's steps, but a basis is used from ``delay`` steps after its momentum on."""
    weight, moment, second = param.double(), *torch.zeros(2, *param.shape, dtype=torch.float64)
    basis, pending, after = torch.empty(0), {}, []
    for t, grad in enumerate(grads):
        moment = BETA1 * moment + (1 - BETA1) * grad.double()
        if not t:
            basis = decompose(moment)
        elif (t - phase) % gap == 0:
            pending[t + delay] = decompose(moment)
        basis = pending.pop(t, basis)
        second = BETA2 * second + (1 - BETA2) * project(grad.double(), *basis) ** 2
        update = project_back(project(moment, *basis) / (second.sqrt() + EPS), *basis)
        size = LR * (1 - BETA2 ** (t + 1)) ** 0.5 / (1 - BETA1 ** (t + 1)) * SCALE
        weight = weight - size * update
        after.append(weight)
    return after


@pytest.mark.parametrize(("gap", "delay"), [(4, 1), (4, 3), (4, 4), (3, 50), (1, 1)])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 6, 4)], ids=str)
def test_bases_are_taken_when_said(shape: tuple[int, ...], gap: int, delay: int) -> None:
    """A delay longer than the interval is one interval."""
    (param,) = toys.parameters(shape)
    grads = toys.gradients([param], STEPS)
    theirs = _late(param, [row[0] for row in grads], gap, min(gap, delay), 0)
    optimizer = Conda(
        [{"params": [param], "algorithm": "conda"}],
        update_proj_gap=gap,
        refresh_delay=delay,
    )
    start = param.detach().clone()
    for ours, expected in zip(toys.take(optimizer, [param], grads), theirs, strict=True):
        assert toys.error(ours[0], expected, start) < 1e-4


def _train(layout: Layout, options: dict[str, Any], runs: int = 1) -> Any:
    """Parameters and states at the end of some runs, and how the last differs from the first."""
    ended = []
    for _ in range(runs):
        model, optimizer = models.build(layout, **options)
        models.train(model, optimizer, range(STEPS))
        ended.append(models.snapshot(model, optimizer, models.whole))
    return models.unequal(ended[-1], ended[0]), ended[0]


@pytest.mark.parametrize("options", [ASYNC], ids=str)
@pytest.mark.thorough
def test_on_shards(options: dict[str, Any]) -> None:
    """One process and many go the same way, and twice the same; whatever is split, or how."""
    start = models.snapshot(*models.build(PLAIN))
    _, alone = _train(PLAIN, options)
    assert models.farthest(_train(PLAIN, {})[1], alone, start) > 1e-3  # the lag is seen
    in_groups = {**options, "basis_budget": 0, "buffer_bytes": 100}
    for i, layout in enumerate(LAYOUTS):
        variant, world = (options, in_groups)[i % 2], torch.Size(layout[1]).numel()
        for unequal, ended in ranks.run(world, _train, layout, variant, 2 if i < 2 else 1):
            assert not unequal
            assert models.farthest(ended, alone, start) < 1e-4


@pytest.mark.parametrize("layout", [((4,), [Shard(0)]), ((2, 2), [Shard(0), Shard(1)])], ids=str)
def test_iterations_on_shards(layout: Any) -> None:
    options = {"refresh_delay": 1, "refresh_method": "orthogonal_iteration"}
    alone = train(None, MATRICES, options)
    for ended in ranks.run(4, train, layout, MATRICES, options):
        assert far(ended, alone) < 1e-5


def _split(layout: Layout) -> dict[str, Tensor]:
    """With the wide weight cut into two wide parts, whose moments travel with the gradient."""
    torch.manual_seed(0)
    model = models.shard(models.Tiny(), layout)
    named = dict(model.named_parameters())
    cut = [(n, p) for n, p in named.items() if n.endswith("down.weight")]
    rest = [(n, p) for n, p in named.items() if not n.endswith("down.weight")]
    groups = [{"params": cut, "algorithm": "conda", "splits": (4, 6)}, {"params": rest}]
    optimizer = Conda(groups, **{**models.SETTINGS, **ASYNC})
    models.train(model, optimizer, range(STEPS))
    return models.snapshot(model, optimizer, models.whole)


def test_wide_parts_on_shards() -> None:
    start, alone = models.snapshot(*models.build(PLAIN)), _split(PLAIN)
    for ended in ranks.run(2, _split, FSDP2):
        assert models.farthest(ended, alone, start) < 1e-4


SAVED = 5
"""Steps taken when saving: one after the snapshot of step 3 was launched, one before it is due."""


def _stop(folder: Path, layout: Layout, saving: dict[str, Any]) -> Any:
    model, optimizer = models.build(layout, **saving)
    models.train(model, optimizer, range(SAVED))
    models.save(folder, model, optimizer)
    pending = [s["snapshot_step"].max().item() for s in optimizer.state.values() if "basis" in s]
    models.train(model, optimizer, range(SAVED, STEPS))
    return pending, models.snapshot(model, optimizer, models.whole)


def _go_on(folder: Path, layout: Layout) -> dict[str, Tensor]:
    model, optimizer = models.build(layout, seed=1, **ASYNC)
    models.train(model, optimizer, range(4))  # it has a pending refresh of its own
    models.load(folder, model, optimizer)
    models.train(model, optimizer, range(SAVED, STEPS))
    return models.snapshot(model, optimizer, models.whole)


def test_checkpoints_hold_what_is_pending(tmp_path: Path) -> None:
    ((pending, ended), *_) = ranks.run(2, _stop, tmp_path, FSDP2, ASYNC)
    assert set(pending) == {3.0}
    for again in ranks.run(2, _go_on, tmp_path, FSDP2):
        assert not models.unequal(again, ended)
    start = models.snapshot(*models.build(PLAIN))
    others = [*ranks.run(3, _go_on, tmp_path, ("fsdp", (3,))), _go_on(tmp_path, PLAIN)]
    for again in others:
        assert models.farthest(again, ended, start) < 1e-4


def test_state_dicts_between_sync_and_async() -> None:
    """What is pending is then due at once, from the momentum there is."""
    for saving, loading in ((ASYNC, {}), ({}, ASYNC)):
        model, optimizer = models.build(PLAIN, **saving)
        models.train(model, optimizer, range(SAVED))
        twin, other = models.build(PLAIN, **loading)
        models.train(twin, other, range(4))
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(optimizer.state_dict())
        steps = {s["basis_step"].max().item() for s in other.state.values() if "basis" in s}
        assert steps == ({0.0} if saving else {3.0})
        models.train(twin, other, [SAVED])
        after = {s["basis_step"].max().item() for s in other.state.values() if "basis" in s}
        assert after == ({float(SAVED)} if saving else {3.0})
        pending = {
            s["snapshot_step"].max().item() for s in other.state.values() if "snapshot_step" in s
        }
        assert pending == ({-1.0} if loading else set())


def test_a_damaged_snapshot_is_refused() -> None:
    model, optimizer = models.build(PLAIN, **ASYNC)
    models.train(model, optimizer, range(SAVED))
    saved = optimizer.state_dict()
    first = next(s for s in saved["state"].values() if "basis" in s)
    del first["snapshot"]
    said = models.attempt(models.build(PLAIN, **ASYNC)[1].load_state_dict, saved)
    assert "snapshot_step are needed: it is damaged" in said


def _fail(layout: Layout) -> tuple[str, list[str]]:
    """One rank's decomposition raises in the background, and then no more."""
    model, optimizer = models.build(layout, **ASYNC)
    models.train(model, optimizer, range(4))
    decompose_ = decomposition.decompose
    where = set[str]()

    def broken(*args: Any, **options: Any) -> Any:
        where.add(threading.current_thread().name)
        if torch.distributed.get_rank() == 1:
            raise MemoryError("no room")
        return decompose_(*args, **options)

    decomposition.decompose = broken
    try:
        said = models.attempt(models.train, model, optimizer, range(4, 9))
    finally:
        decomposition.decompose = decompose_
    models.train(model, optimizer, range(9, STEPS))
    assert all(name.startswith("conda_dist refresh") for name in where), where
    return said, [s["basis_step"].max().item() for s in optimizer.state.values() if "basis" in s]


def test_an_exception_in_the_background_reaches_all_ranks() -> None:
    for said, steps in ranks.run(2, _fail, FSDP2):
        assert "Conda could not refresh its bases: rank 1: MemoryError: no room" in said
        assert "while decomposing the momentum of blocks." in said
        assert min(steps) >= 3  # what was pending was launched anew


def test_broken_momenta_are_said_when_the_bases_are_due() -> None:
    (param,) = toys.parameters((6, 4))
    optimizer = Conda(
        [{"params": [("w", param)], "algorithm": "conda"}], update_proj_gap=3, **ASYNC
    )
    grads = toys.gradients([param], 6)
    toys.take(optimizer, [param], grads[:3])
    grads[3][0][0, 0] = torch.nan
    toys.take(optimizer, [param], grads[3:5])
    with pytest.warns(RuntimeWarning, match="w: the basis could not be refreshed at step 5"):
        toys.take(optimizer, [param], grads[5:])
    assert optimizer.state[param]["basis_step"] == 0


FORSAKEN = """
import time, torch
from conda_dist import Conda
from conda_dist.numerics import decomposition
def slow(*arguments, plain=decomposition.decompose):
    time.sleep(0.5)
    decomposed.append(1)
    return plain(*arguments)
decomposed = []
params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(40)]
optimizer = Conda([{"params": params, "algorithm": "conda"}], update_proj_gap=1, refresh_delay=1)
for step in range(2):
    for param in params:
        param.grad = torch.randn(4, 4)
    optimizer.step()
    decomposition.decompose = slow
assert optimizer.state[params[0]]["snapshot_step"] == 1
import threading
(worker,) = [t for t in threading.enumerate() if t is not threading.main_thread()]
def tell():
    worker.join()
    print(len(decomposed))
threading.Thread(target=tell).start()
raise SystemExit(7)
"""


@pytest.mark.thorough
def test_a_process_ends_with_refreshes_pending() -> None:
    """It waits for the matrix at hand, not for the other 39."""
    ended = subprocess.run([sys.executable, "-c", FORSAKEN], timeout=60, capture_output=True)
    assert ended.returncode == 7
    assert int(ended.stdout) < 5


ELSEWHERE = """
import threading, torch
from conda_dist import Conda
from conda_dist.numerics import decomposition
params = [torch.nn.Parameter(torch.randn(60, 40)) for _ in range(8)]
optimizer = Conda(
    [{"params": params, "algorithm": "conda"}], update_proj_gap=2, refresh_delay=1
)
def train():
    threading.main_thread().join()
    for step in range(9):
        for param in params:
            param.grad = torch.randn(60, 40)
        optimizer.step()
    print(int(optimizer.state[params[0]]["basis_step"]))
threading.Thread(target=train).start()
"""


@pytest.mark.thorough
def test_training_in_a_thread_that_outlives_the_main_one() -> None:
    ended = subprocess.run([sys.executable, "-c", ELSEWHERE], timeout=60, capture_output=True)
    assert ended.stdout.strip() == b"6", ended.stderr
