"""Zero and broken gradients and momenta, on several ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import models
import ranks
from models import GAP, Layout
from traffic import Call, recorded

LAYOUTS: list[Layout] = [("fsdp", (2,)), ("fsdp", (3,)), ("hsdp", (2, 2)), ("ddp", (2,))]
ON_ALL = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
SQUARE, WIDE, BATCH = "blocks.0.q.weight", "blocks.1.down.weight", "blocks.0.experts"


def _state(model: Any, optimizer: Any, name: str) -> dict[str, Tensor]:
    return optimizer.state[dict(model.named_parameters())[name]]


def _only(snapshot: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in snapshot.items() if key.split(":")[0] in names}


def _without(snapshot: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in snapshot.items() if key.split(":")[0] not in names}


def _zero_first(layout: Layout) -> list[str]:
    """All gradients are zero at first: as if those steps had not been."""
    model, optimizer = models.build(layout)
    start = models.snapshot(model, optimizer)
    models.train(model, optimizer, range(50, 53), "")  # every name ends with ""
    after = models.snapshot(model, optimizer)
    problems = models.unequal({name: after[name] for name in start}, start)
    problems += [k for k, v in after.items() if k.endswith(":step") and v != 0]
    problems += [k for k, v in after.items() if k.endswith("basis_step") and (v != -1).any()]
    twin, other = models.build(layout)
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(GAP + 2))
    return problems + models.unequal(
        models.snapshot(model, optimizer), models.snapshot(twin, other)
    )


@ON_ALL
def test_a_first_step_of_zeros_does_not_count(layout: Layout) -> None:
    for problems in ranks.run_on(layout, _zero_first):
        assert not problems


def _zero_for_one(layout: Layout) -> list[str]:
    """Two matrices have zero gradients while the others train, then train too."""
    late = (SQUARE, WIDE)
    model, optimizer = models.build(layout)
    start = models.snapshot(model, optimizer)
    models.train(model, optimizer, range(GAP + 1), *late)
    after = models.snapshot(model, optimizer)
    problems = models.unequal(_only(start, *late), {name: after[name] for name in late})
    for name in late:
        state = _state(model, optimizer, name)
        if state["step"] != 0 or state["basis_step"] != -1:
            problems.append(f"{name}: counted")
    if _state(model, optimizer, BATCH)["step"] != GAP + 1:
        problems.append("the others were held up")
    # What they do then is what they do in a run in which they had no gradient until then, and
    # the refresh is at their own first step.
    twin, other = models.build(layout)
    for name, param in twin.named_parameters():
        param.requires_grad_(name not in late)
    models.train(twin, other, range(GAP + 1))
    for param in twin.parameters():
        param.requires_grad_(True)
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(GAP + 1, GAP + 3))
    for name in late:
        if _state(model, optimizer, name)["basis_step"] != 0:
            problems.append(f"{name}: no basis at its first step")
    return problems + models.unequal(
        models.snapshot(model, optimizer), models.snapshot(twin, other)
    )


@ON_ALL
def test_a_matrix_with_no_gradient_yet_waits_for_its_own(layout: Layout) -> None:
    for problems in ranks.run_on(layout, _zero_for_one):
        assert not problems


def _zero_expert(layout: Layout, until: int, last: int) -> tuple[dict[str, Tensor], list[str]]:
    """An expert that gets no tokens at first."""
    model, optimizer = models.build(layout)
    param = dict(model.named_parameters())[BATCH]
    state, problems = None, []
    for step in range(last):
        whole = models.whole(models.gradient(BATCH, param, step))
        if step < until:
            whole[1] = 0
        param.grad = models.like(param, whole)
        optimizer.step()
        state = optimizer.state[param]
        basis, momentum = models.whole(state["basis"]), models.whole(state["exp_avg"])
        taken = state["basis_step"].tolist()
        since = step - step % GAP
        expected = [since, -1 if step < until else until if since < until else since, since]
        if taken != expected:
            problems.append(f"step {step}: bases taken at {taken}, not {expected}")
        if step < until and not torch.equal(basis[1], torch.eye(6)):
            problems.append(f"step {step}: a basis was made up of nothing")
        if step == until:  # of its own momentum: projected, that has orthogonal columns
            gram = momentum[1].T @ momentum[1]
            if (gram - gram.diag().diag()).abs().max() > 1e-5 * gram.max():
                problems.append("the basis is not that of the momentum")
    return {BATCH: models.whole(param)}, problems


@pytest.mark.parametrize("layout", [("fsdp", (2,)), ("fsdp", (4,)), ("ddp", (2,))], ids=str)
@pytest.mark.parametrize("until", [1, GAP + 1])
def test_an_expert_without_tokens_waits_for_its_own(layout: Layout, until: int) -> None:
    start = models.build(models.PLAIN)[0].state_dict()
    alone, problems = _zero_expert(models.PLAIN, until, 2 * GAP + 2)
    assert not problems
    for ended, problems in ranks.run_on(layout, _zero_expert, until, 2 * GAP + 2):
        assert not problems
        assert models.farthest(ended, alone, start) < 1e-4


def _waiting(layout: Layout) -> tuple[list[Call], int]:
    """What a step sends while an expert has had no tokens yet, and what steps send by the plan."""
    model, optimizer = models.build(layout)
    for step in range(2):
        for name, param in model.named_parameters():
            whole = models.whole(models.gradient(name, param, step))
            if name == BATCH:
                whole[1] = 0
            param.grad = models.like(param, whole)
        with recorded() as calls:
            optimizer.step()
    planned = sum(row["step_bytes"] for row in optimizer.report(show=False))
    return calls, planned


@pytest.mark.parametrize("layout", [("fsdp", (2,)), ("fsdp", (3,)), ("hsdp", (2, 2))], ids=str)
def test_an_expert_without_tokens_costs_next_to_nothing(layout: Layout) -> None:
    for calls, planned in ranks.run_on(layout, _waiting):
        assert sum(call.sent for call in calls if call.name == "all_to_all") == planned > 0
        # An agreement that some momentum is zero still, and one on the steps that were taken.
        assert (
            0
            < sum(call.sent for call in calls if call.name != "all_to_all")
            <= 16 + 72 * len(layout[1])
        )


def _spoil(optimizer: Any, model: Any, names: tuple[str, ...], value: float) -> dict[str, Tensor]:
    """Spoils the first element of momenta wherever it is held; returns them as they were."""
    kept = {}
    for name in names:
        momentum = _state(model, optimizer, name)["exp_avg"]
        kept[name] = models.local(momentum)
        spoilt = models.whole(momentum)
        spoilt.view(-1)[0] = value
        _fill(momentum, models.local(models.like(momentum, spoilt)))
    return kept


def _repair(optimizer: Any, model: Any, kept: dict[str, Tensor]) -> None:
    for name, value in kept.items():
        _fill(_state(model, optimizer, name)["exp_avg"], value)


def _fill(tensor: Tensor, value: Tensor) -> None:
    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(value)


def _broken_momentum(layout: Layout, value: float) -> list[str]:
    """Momenta that are not finite, repaired before it is too late, then broken for good."""
    names = (SQUARE, WIDE, BATCH)
    model, optimizer = models.build(layout)
    twin, other = models.build(layout)
    models.train(model, optimizer, range(GAP))
    models.train(twin, other, range(GAP))
    kept = _spoil(optimizer, model, names, value)
    bases = _only(models.snapshot(model, optimizer), *names)
    bases = {key: v for key, v in bases.items() if key.endswith(":basis")}
    first, problems = dist.get_rank() == 0, []

    def check(true: bool, what: str) -> None:
        if not true:
            problems.append(what)

    for step in (GAP, GAP + 1):
        said = models.warned_step(model, optimizer, step)
        models.warned_step(twin, other, step)
        if first:
            check(len(said) == 1, f"step {step}: said {said}")
            check(all(n in said[0] for n in names), f"step {step}: {said} names not all")
            check("not finite" in said[0], f"step {step}: {said}")
        now = models.snapshot(model, optimizer)
        wrong = {key: now[key] for key in bases if not key.startswith(BATCH)}
        check(not models.unequal(wrong, {k: bases[k] for k in wrong}), "a basis was changed")
        whole = models.whole(_state(model, optimizer, BATCH)["basis"])
        old = models.whole(_state(twin, other, BATCH)["basis"])
        check(not torch.equal(whole[0], old[0]), "the broken matrix of the batch was refreshed")
        check(torch.equal(whole[1:], old[1:]), "the sound matrices of the batch were held up")
        taken = _state(model, optimizer, SQUARE)["basis_step"]
        check(taken == 0, f"step {step}: counted as refreshed")
        check(_state(model, optimizer, BATCH)["basis_step"].tolist() == [0, GAP, GAP], "batch")
        lost = models.unequal(_without(now, *names), _without(models.snapshot(twin, other), *names))
        check(not lost, f"others were touched: {lost}")

    _repair(optimizer, model, kept)
    check(models.warned_step(model, optimizer, GAP + 2) == [], "warned of a sound momentum")
    for name in names:
        taken = _state(model, optimizer, name)["basis_step"].flatten()[0]
        check(taken == GAP + 2, f"{name}: not refreshed as soon as it could be")
    now = models.snapshot(model, optimizer)
    check(bool(models.unequal({k: now[k] for k in bases}, bases)), "the bases are the old ones")

    # The count began anew: two failures are behind it, and three in a row are needed again.
    _spoil(optimizer, model, names[:1], value)
    for step in (2 * GAP, 2 * GAP + 1):
        said = models.warned_step(model, optimizer, step)
        check(not first or SQUARE in said[0], f"{said}")
    said = models.attempt(models.warned_step, model, optimizer, 2 * GAP + 2)
    check(said.startswith("RuntimeError") and SQUARE in said, f"raised {said!r}")
    check("the run ends at 3" in said, f"does not say why: {said!r}")
    return problems


@ON_ALL
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_broken_momentum_gives_no_basis(layout: Layout, value: float) -> None:
    for problems in ranks.run_on(layout, _broken_momentum, value):
        assert not problems


def _broken_first_gradient(layout: Layout) -> list[str]:
    """NaN from the first step on: the identity stays, until all ranks raise together."""
    model, optimizer = models.build(layout)
    param = dict(model.named_parameters())[WIDE]
    said = []
    for step in range(3):
        grad = models.gradient(WIDE, param, step)
        _fill(grad, torch.full_like(models.local(grad), float("nan")))
        param.grad = grad
        said.append(models.attempt(optimizer.step))
    return said


@ON_ALL
def test_a_first_gradient_of_nan_ends_the_run_on_all_ranks(layout: Layout) -> None:
    for *before, last in ranks.run_on(layout, _broken_first_gradient):
        assert before == ["nothing was raised"] * 2
        assert WIDE in last
