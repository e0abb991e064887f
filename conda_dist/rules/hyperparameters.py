"""The hyperparameters of a group in the form that the arithmetic takes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conda_dist.numerics.arithmetic import Hyper


def hyper_of(group: Mapping[str, Any], scale: str = "scale") -> Hyper:
    """The current hyperparameters of a group, as numbers that torch's kernels accept.

    Args:
        group: the group.
        scale: the key of the factor on the update: "scale", or "adamw_scale" on the adamw path,
            where a group that has ``adamw_eps`` has another use for ``eps``.
    """
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    # A rate on the CPU is read, which costs nothing. Foreach kernels need other rates 0-d.
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return Hyper(
        lr.reshape(()) if on_device else float(lr),
        float(beta1),
        float(beta2),
        float(group.get("adamw_eps", group["eps"])),
        float(group["weight_decay"]),
        float(group[scale]),
        group.get("correct_bias", True),
    )
