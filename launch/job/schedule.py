"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from conda_dist.launch.job.config import ScheduleConfig


def factor(config: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """What the peak rate is multiplied by in step `step` (0-based) of `steps`.

    Args:
        config: Shape, warmup and floor.
        peak: Peak learning rate, needed where the floor is given as a rate.
        steps: Length of the whole run.
        step: The step about to be taken; from `steps` on the final value is kept.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1.0 - progress
    floor = config.min_lr_ratio if config.min_lr is None else config.min_lr / peak
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
