"""The adamw path: the released code's rule for it, by torch's foreach kernels. One process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import toys
from conda_dist import Conda
from conda_dist.numerics import adamw, arithmetic
from conda_dist.rules.hyperparameters import hyper_of

SHAPES = ((7, 3), (5,), (), (2, 3, 4), (1, 6), (2, 2, 3, 3))


def _conda(params: list[torch.nn.Parameter], **options: Any) -> Conda:
    return Conda([{"params": params, "algorithm": "adamw"}], **options)


def _by_hand(
    param: Tensor,
    grads: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    correct_bias: bool,
) -> Tensor:
    """The released code's rule, as one reads it there."""
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad * grad
        step_size = lr
        if correct_bias:
            step_size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        param = param - step_size * m / (v.sqrt() + eps)
        param = param - lr * weight_decay * param
    return param


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_rule(weight_decay: float, eps: float, correct_bias: bool) -> None:
    """eps joins the uncorrected root, decay follows the update, ``scale`` does not apply."""
    options = {
        "lr": 0.05,
        "betas": (0.8, 0.95),
        "eps": eps,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }
    params = toys.parameters(*SHAPES, dtype=torch.float64)
    starts, grads = toys.copies(params), toys.gradients(params, 9)
    toys.take(_conda(params, **options, scale=7.0, update_proj_gap=1), params, grads)
    for i, (param, start) in enumerate(zip(params, starts, strict=True)):
        expected = _by_hand(start.detach(), [row[i] for row in grads], **options)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14)


def test_without_eps_and_decay_it_is_adamw() -> None:
    params = toys.parameters(*SHAPES, dtype=torch.float64)
    twins, grads = toys.copies(params), toys.gradients(params, 9)
    toys.take(_conda(params, lr=0.05, betas=(0.9, 0.99), eps=0.0), params, grads)
    theirs = torch.optim.AdamW(twins, lr=0.05, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    toys.take(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    params = toys.parameters(*SHAPES, dtype=dtype)
    twins = [torch.nn.Parameter(param.detach().double()) for param in params]
    starts, grads = toys.copies(twins), toys.gradients(params, 8)
    optimizer = _conda(params, lr=0.05, state_dtype=state_dtype)
    toys.take(optimizer, params, grads)
    toys.take(_conda(twins, lr=0.05), twins, [[g.double() for g in row] for row in grads])
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
    if state_dtype == torch.bfloat16:
        tolerance = dict.fromkeys(tolerance, 0.1)
    moments = state_dtype or torch.float32
    for param, twin, start in zip(params, twins, starts, strict=True):
        state = optimizer.state[param]
        assert param.dtype == dtype
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == moments
        assert toys.error(param, twin, start) < tolerance[dtype]


def test_small_steps_are_not_lost_to_rounding_of_the_moments() -> None:
    """bfloat16 moments are computed in float32 and rounded once: b2 = 0.999 still moves v."""
    params = toys.parameters((64,))
    optimizer = _conda(params, betas=(0.9, 0.99), state_dtype=torch.bfloat16)
    grads = [[torch.ones(64)] for _ in range(200)]
    toys.take(optimizer, params, grads)
    v = optimizer.state[params[0]]["exp_avg_sq"].float()
    assert (v - (1 - 0.99**200)).abs().max() < 0.5


def _kernels(optimizer: Conda) -> dict[str, int]:
    """How often a step calls which kernel for many tensors."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step()
    counts = {event.key.removeprefix("aten::"): event.count for event in trace.key_averages()}
    return {name: n for name, n in counts.items() if name in ("_fused_adamw_", "_foreach_lerp_")}


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_both_kernels_take_the_same_step(
    monkeypatch: pytest.MonkeyPatch, weight_decay: float, correct_bias: bool
) -> None:
    """With an eps that matters, as do decay and the correction of the first moments."""
    runs = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(arithmetic, "FUSED_DEVICES", devices)
        params = toys.parameters(*SHAPES, (9, 9), (3,))
        options = {"eps": 0.1, "weight_decay": weight_decay, "correct_bias": correct_bias}
        toys.take(
            _conda(params, lr=torch.tensor(0.1), **options), params, toys.gradients(params, 4)
        )
        runs.append(params)
    for fused, foreach in zip(*runs, strict=True):
        torch.testing.assert_close(fused, foreach, rtol=1e-6, atol=1e-7)


def test_one_call_for_all_parameters_alike() -> None:
    params = toys.parameters(*[(3, 2)] * 20)
    optimizer = _conda(params)
    toys.take(optimizer, params, toys.gradients(params, 2))
    assert _kernels(optimizer) == {"_fused_adamw_": 1}
    # Of two dtypes, and of one that is in another order.
    mixed = toys.parameters((3,), (4,)) + toys.parameters((3,), (4,), dtype=torch.bfloat16)
    turned = torch.nn.Parameter(torch.ones(4, 3).T)
    optimizer = _conda([*mixed, turned])
    toys.take(optimizer, [*mixed, turned], toys.gradients([*mixed, turned], 1))
    assert _kernels(optimizer) == {"_fused_adamw_": 1, "_foreach_lerp_": 2}


def test_chunks_do_not_change_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(arithmetic, "FUSED_DEVICES", frozenset())
    for numel in (2**24, 30, 1):
        monkeypatch.setattr(adamw, "CHUNK_NUMEL", numel)
        params = toys.parameters(*SHAPES, (9, 9), (3,))
        toys.take(_conda(params, weight_decay=0.1), params, toys.gradients(params, 4))
        runs.append(params)
    assert toys.same(runs[0], runs[1])
    assert toys.same(runs[0], runs[2])


def test_a_step_needs_memory_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "CHUNK_NUMEL", 4096)
    monkeypatch.setattr(arithmetic, "FUSED_DEVICES", frozenset())
    for shapes in ([(64, 64)] * 12, [(12 * 64, 64)]):  # many parameters; one larger than a chunk
        params = toys.parameters(*shapes)
        optimizer = _conda(params)
        toys.take(optimizer, params, toys.gradients(params, 2))
        assert 0 < toys.peak(optimizer.step) <= 3 * 4096 * 4


def test_the_fused_kernel_holds_nothing() -> None:
    params = toys.parameters(*[(64, 64)] * 12)
    optimizer = _conda(params)
    toys.take(optimizer, params, toys.gradients(params, 2))
    assert toys.peak(optimizer.step) < 1024


def test_empty_and_scalar_parameters() -> None:
    params = toys.parameters((0,), (0, 5), (3, 0), (), (1,))
    optimizer = _conda(params)
    toys.take(optimizer, params, toys.gradients(params, 3))
    assert [int(optimizer.state[param]["step"]) for param in params] == [3] * 5
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
    ids=str,
)
def test_a_rate_on_a_device_is_not_rounded(given: torch.dtype, kept: torch.dtype) -> None:
    group = {**Conda(toys.parameters()).param_groups[0]}
    group["lr"] = torch.ones(1, dtype=given, device="meta")  # stands for a GPU
    lr = hyper_of(group).lr
    assert isinstance(lr, Tensor)
    assert (lr.dtype, lr.shape, lr.device.type) == (kept, (), "meta")


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_rate_in_a_tensor_is_as_exact_as_a_number(
    is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64. Only the fused kernel gets it in float32, because CUDA's takes no other dtype.

    The tensor is on the CPU here, where a step reads it; so the arithmetic is called by itself.
    """
    fused, taken = torch._fused_adamw_, []

    def watched(*args: Any, lr: Any, **kwargs: Any) -> None:
        taken.append(getattr(lr, "dtype", None))
        fused(*args, lr=lr, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    monkeypatch.setattr(adamw, "can_fuse", lambda *_: is_fused)

    def stepped(lr: float | Tensor, weight: float) -> Tensor:
        param, grad = (toys.random(5, 4, seed=i, dtype=torch.float64) * weight for i in (1, 2))
        moments = (torch.zeros_like(param) for _ in range(2))
        hyper = arithmetic.Hyper(lr, 0.9, 0.99, 1e-8, 0.3, 1.0, True)
        adamw.adamw_([adamw.Entry("w", param, grad, *moments)], 1, hyper)
        return param

    rate = 1e-3 / 3
    tensor = torch.tensor(rate, dtype=torch.float64)
    error = (stepped(tensor, 1e6) / stepped(rate, 1e6) - 1).abs().max()
    assert error < (1e-14 if not is_fused else 1e-13)
    assert taken == ([torch.float32, None] if is_fused else [])
