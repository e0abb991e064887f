"""The hyperparameters of a group in the form that the arithmetic takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics.arithmetic import Hyper


def hyper_of(group: Mapping[str, Any], scale: str = "scale") -> Hyper:
    """The current hyperparameters of a group, as numbers or 0-d tensors for the arithmetic.

    ``eps`` is the group's ``adamw_eps`` if it has one: then its rule uses ``eps`` for something
    else.

    Args:
        group: the parameter group.
        scale: the key of the factor on the update: "scale", or "adamw_scale" for the adamw path,
            which has no ``nesterov``.
    """
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    # Reading a CPU tensor costs nothing. On a device, foreach kernels need a 0-d tensor. One in
    # float64 stays so: in float32, 1 - lr * weight_decay would be off by up to 3e-8 in each step.
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = lr.reshape(()).to(torch.promote_types(lr.dtype, torch.float32))
    else:
        lr = float(lr)
    return Hyper(
        lr,
        float(beta1),
        float(beta2),
        float(group.get("adamw_eps", group["eps"])),
        float(group["weight_decay"]),
        float(group[scale]),
        group.get("correct_bias", True),
        scale == "scale" and group.get("nesterov", False),
    )
