"""A step as a whole: what it costs the host, and that an error leaves nothing half done."""

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import conda_dist
import toys
from conda_dist import Conda


def test_calls_of_a_steady_step() -> None:
    """The host enters few Python functions for each weight: it must keep ahead of the device."""
    package = str(Path(conda_dist.__file__).parent)

    def calls(weights: int) -> int:
        params, count = toys.parameters(*[(6, 4)] * weights), 0
        optimizer = Conda(params, update_proj_gap=100)
        grads = toys.gradients(params, 3)
        toys.take(optimizer, params, grads[:2])
        for param, grad in zip(params, grads[2], strict=True):
            param.grad = grad

        def count_calls(frame: FrameType, event: str, _: object) -> None:
            nonlocal count
            count += event == "call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(count_calls)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return count

    assert calls(2) <= 91
    assert (calls(12) - calls(2)) / 10 <= 26


def test_a_state_of_another_shape_changes_nothing() -> None:
    """Nor any of the weights that would have shared its kernel."""
    params = toys.parameters((6, 4), (6, 4), (6, 4))
    optimizer, grads = Conda(params, **toys.OPTIONS), toys.gradients(params, 2)
    toys.take(optimizer, params, grads[:1])
    broken = optimizer.state[params[1]]
    whole, broken["exp_avg_sq"] = broken["exp_avg_sq"], torch.zeros(4, 4)
    before = toys.copies(params), [optimizer.state[p]["exp_avg"].clone() for p in params]
    with pytest.raises(ValueError, match=r"exp_avg_sq has shape \(4, 4\)"):
        toys.take(optimizer, params, grads[1:])
    assert toys.same(params, before[0])
    assert toys.same([optimizer.state[p]["exp_avg"] for p in params], before[1])
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1, 1]
    broken["exp_avg_sq"] = whole
    toys.take(optimizer, params, grads[1:])
    assert not toys.same(params[:1], before[0][:1])
