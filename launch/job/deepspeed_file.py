"""A user's own DeepSpeed JSON: which settings it may have. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conda_dist.launch.job.config import Config, ConfigError

_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "training.micro_batch_size",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16": "training.compute_dtype",
    "bfloat16": "training.compute_dtype",
    "fp16": "training.compute_dtype",
    "amp": "training.compute_dtype",
    "torch_autocast": "training.compute_dtype",
    "data_types": "training.compute_dtype",
}
"""Keys of the JSON that the job sets itself, with the job's keys that say what."""


def read_file(config: Config) -> dict[str, Any]:
    """What the file `deepspeed.config` says; {} without one, or with another engine.

    Raises:
        ConfigError: It cannot be read, is no JSON object, or has keys that are the job's.
    """
    file, problem = config.deepspeed.config, ""
    if config.engine != "deepspeed" or not file:
        return {}
    given: Any = {}
    try:
        given = json.loads(Path(file).read_text())
        problem = _refusal(given, config.deepspeed.stage)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        problem = f"it is not valid JSON: {error}"
    if problem:
        raise ConfigError(f"deepspeed.config {file}: {problem}")
    return dict(given)


def _refusal(given: Any, stage: int) -> str:
    """Why the user's settings cannot be taken; "" if they can."""
    if not isinstance(given, Mapping):
        return "an object is wanted, { ... }"
    owned = [f"{key!r} is set by {_OWNED[key]}" for key in given if key in _OWNED]
    if owned:
        return f"{'; '.join(owned)}, of the job's config: remove it from the file"
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return f"zero_optimization = {zero!r}: an object is wanted, {{ ... }}"
    if zero.get("compute_grad_norm") is False:
        return "zero_optimization.compute_grad_norm is false: the job needs the norm; remove it"
    if zero.get("stage", stage) != stage:
        return (
            f"zero_optimization.stage is {zero['stage']} there and deepspeed.stage is {stage}: "
            f"give --deepspeed.stage {zero['stage']}, or remove it from the file"
        )
    return ""
