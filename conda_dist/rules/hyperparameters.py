"""The hyperparameters of a group in the form that the arithmetic takes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conda_dist.numerics.arithmetic import Hyper


def hyper_of(group: Mapping[str, Any], scale: str = "scale") -> Hyper:
    """The current hyperparameters of a group, as numbers that torch's kernels accept.

    ``eps`` is the group's ``adamw_eps`` if it has one: then its rule uses ``eps`` for something
    else.

    Args:
        group: the parameter group.
        scale: the key of the factor on the update: "scale", or "adamw_scale" for the adamw path.
    """
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    # Reading a CPU tensor costs nothing. On a device, foreach kernels need a 0-d tensor, and the
    # fused one of CUDA a float32.
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return Hyper(
        lr.reshape(()).float() if on_device else float(lr),
        float(beta1),
        float(beta2),
        float(group.get("adamw_eps", group["eps"])),
        float(group["weight_decay"]),
        float(group[scale]),
        group.get("correct_bias", True),
        scale == "scale" and group.get("nesterov", False),
    )
