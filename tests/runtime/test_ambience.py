"""Steps inside torch.autocast and inside functions that torch.compile compiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from conda_dist import Conda
from conda_dist.reference import ReferenceConda

STEPS = 7
NAMES = ("b.0.weight", "b.1.weight", "b.1.bias")


def _trained(inside: Any, scale: float, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and states after steps, taken as ``inside`` says."""
    params = toys.parameters()
    optimizer = Conda(list(zip(NAMES, params, strict=True)), **{**toys.OPTIONS, **options})
    for row in toys.gradients(params, STEPS):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad * scale
        with inside:
            optimizer.step()
    states = [s for p in params for s in optimizer.state[p].values()]
    return params, states


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh_delay": 2},
        {"refresh_method": "orthogonal_iteration"},
        {"second_moment_dtype": torch.uint8},
    ],
    ids=["svd", "async", "iteration", "codes"],
)
def test_a_step_inside_autocast_is_that_of_outside(
    options: dict[str, Any], dtype: torch.dtype, scale: float
) -> None:
    outside = _trained(torch.autocast("cpu", enabled=False), scale, **options)
    inside = _trained(torch.autocast("cpu", dtype), scale, **options)
    for ours, theirs in zip(inside, outside, strict=True):
        assert toys.same(ours, theirs)


def test_a_loop_inside_autocast_trains_as_one_with_an_autocast_for_each_step() -> None:
    """Autocast keeps its copies of the weights until it is left; a step drops them."""

    def losses(whole: bool) -> list[float]:
        model, found = toys.Block(), []
        optimizer = Conda(model.named_parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=whole):
            for step in range(5):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = toys.loss(model, step)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            assert torch.is_autocast_enabled("cpu") is whole
        return found

    assert losses(True) == losses(False)


def test_a_closure_runs_as_its_caller_would_have_it() -> None:
    model, seen = toys.Block(), []
    optimizer = Conda(model.named_parameters())

    def closure() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        loss = toys.loss(model, 0)
        loss.backward()
        return loss.item()

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    optimizer.step(closure)
    assert seen == [(True, True), (False, True)]


def _train(wrap: Callable[[Any], Any], whole: bool) -> list[Tensor]:
    model = toys.Block()
    params = list(model.parameters())
    optimizer = Conda(model.named_parameters(), **toys.OPTIONS)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def both(step: int) -> None:
        toys.loss(model, step).backward()
        update()

    step_both, step_update = wrap(both), wrap(update)
    for step in range(5):
        if whole:
            step_both(step)
        else:
            toys.loss(model, step).backward()
            step_update()
    assert all(param.grad is None for param in params)
    assert all(optimizer.state[param]["step"] == 5 for param in params)
    return params


@pytest.mark.parametrize("whole", [False, True], ids=["the update", "the whole step"])
def test_compiled_functions_may_call_it(whole: bool) -> None:
    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager")

    assert toys.same(_train(compiled, whole), _train(lambda f: f, whole))


def test_step_and_zero_grad_may_be_compiled() -> None:
    params, twins = toys.parameters((6, 4), (3, 5)), toys.parameters((6, 4), (3, 5))
    optimizer = Conda([{"params": params, "algorithm": "conda"}], **toys.OPTIONS)
    reference = ReferenceConda([{"params": twins, "algorithm": "conda"}], **toys.OPTIONS)
    step, zero_grad = torch.compile(optimizer.step), torch.compile(optimizer.zero_grad)
    for row in toys.gradients(params, STEPS):
        for param, twin, grad in zip(params, twins, row, strict=True):
            param.grad, twin.grad = grad.clone(), grad.clone()
        step()
        zero_grad()
        reference.step()
    for param, twin in zip(params, twins, strict=True):
        assert param.grad is None
        torch.testing.assert_close(param, twin, rtol=0, atol=1e-5)
