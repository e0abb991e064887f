"""DeepSpeed's engine on the processes of ``ranks``, with the model of ``models``."""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from conda_dist import Conda, param_groups

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "update_proj_gap": 3, "eps": 1e-4}
LINEAR = nn.functional.linear
BATCH, LENGTH, STEPS = 24, 8, 7
"""Any number of ranks up to 4 divides the batch; its gradients have full rank."""


def tokens(step: int) -> Tensor:
    """The batch of a step, the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(models.VOCABULARY, (BATCH, LENGTH), generator=generator)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Of predicting a permutation of the tokens."""
    wanted = (5 * batch + batch.roll(1, -1)) % models.VOCABULARY
    return nn.functional.cross_entropy(model(batch).float().flatten(0, 1), wanted.flatten())


def settle() -> Any:
    """DeepSpeed, made to forget the process groups of earlier calls."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import groups, logger

        import conda_dist.integrations.deepspeed  # noqa: F401
    logger.setLevel("WARNING")
    sys.modules["deepspeed.comm.comm"].cdb = None
    # Ranks must number parameters alike, and have not all taken part in the same calls before.
    deepspeed.zero.Init.param_id = 0
    offload = sys.modules["deepspeed.runtime.zero.parameter_offload"].DeepSpeedZeRoOffload
    offload._register_deepspeed_module.__defaults__[0][0] = 0
    for name in [n for n in vars(groups) if n.startswith("_") and n.isupper()]:
        if isinstance(getattr(groups, name), dict):
            getattr(groups, name).clear()
        else:
            setattr(groups, name, None)
    # ZeRO-3 leaves its own in the place of torch's; ranks would then reduce in different orders.
    nn.functional.linear = LINEAR
    # DeepSpeed refuses fp16 on CPUs, whose torch has long had it.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def config(stage: int, dtype: str = "fp32", **others: Any) -> dict[str, Any]:
    """A DeepSpeed config; ``others`` replace or add to its entries, ``zero`` to ZeRO's own."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **others.pop("zero", {})}
    made = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "optimizer": {"type": "Conda", "params": {**SETTINGS, **others.pop("params", {})}},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
        **others,
    }
    return made


def build(made: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine of the small model."""
    deepspeed = settle()
    torch.manual_seed(0)
    model = models.Tiny() if model is None else model
    engine, *_ = deepspeed.initialize(
        model=model, config=made, dist_init_required=False, **arguments
    )
    return engine


def train(engine: Any, steps: Iterable[int], factor: float = 1) -> list[float]:
    """Takes steps, with the loss times ``factor``; returns this rank's losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        mine = tokens(step).chunk(world)[rank].chunk(engine.gradient_accumulation_steps())
        for micro in mine:
            value = loss(engine, micro) * factor
            engine.backward(value)
            engine.step()
            losses.append(value.item())
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """The master weights, whole, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        groups = getattr(engine.optimizer, "fp32_groups", [named.values()])
        values = [master for group in groups for master in group]
    elif engine.zero_optimization_stage() < 3 and engine.get_data_types()[0] == torch.float32:
        values = list(named.values())
    elif engine.zero_round_robin_gradients() and engine.zero_optimization_stage() < 3:
        return _masters(engine)  # DeepSpeed's own way to them is wrong then
    else:
        values = [safe_get_full_fp32_param(param) for param in named.values()]
    return {name: value.detach().float().clone() for name, value in zip(named, values, strict=True)}


def _masters(engine: Any) -> dict[str, Tensor]:
    """The master weights, put together from what Conda updates on each rank."""
    whole = {name: torch.zeros(p.shape) for name, p in engine.module.named_parameters()}
    for partition_step in engine.basic_optimizer._steps.values():
        for shard in partition_step.shards:
            flat = whole[shard.info.name].view(-1)
            held = shard.view(partition_step.tensors[shard.tensor_index].detach())
            flat[shard.first : shard.first + shard.length] = held
    for value in whole.values():
        dist.all_reduce(value)
    return whole


def alone(
    grouped: Any = None,
    dtype: torch.dtype = torch.float32,
    clip: float = 0,
    factor: float = 1,
    splits: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    """One process with conda_dist.Conda on the same data.

    Gradients are ``factor`` times those of the weights rounded to ``dtype``, clipped to the norm
    ``clip`` if it is not 0.
    """
    torch.manual_seed(0)
    model = models.Tiny().to(dtype).float()
    groups = param_groups(model, splits=splits)
    if grouped is not None:
        chosen = {n: g["algorithm"] for g in groups for n, _ in g["params"]}
        groups = [
            {**group, "params": [pair], "algorithm": chosen[pair[0]]}
            for group in grouped(list(model.named_parameters()))
            for pair in group["params"]
        ]
    optimizer = Conda(groups, **{**SETTINGS, **options})
    low = copy.deepcopy(model).to(dtype)
    for step in range(STEPS):
        low.load_state_dict(model.state_dict())
        low.zero_grad()
        (loss(low, tokens(step)) * factor).backward()
        for ours, theirs in zip(model.parameters(), low.parameters(), strict=True):
            ours.grad = theirs.grad.float()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip, "nothing was clipped"
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def start(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights that all begin with."""
    torch.manual_seed(0)
    model = models.Tiny().to(dtype).float()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def convert(folder: str, tag: str = "saved") -> None:
    """DeepSpeed's own conversion, as ``python -m deepspeed.checkpoint.ds_to_universal``."""
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=f"{folder}/{tag}",
            output_folder=f"{folder}/universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        ds_to_universal.main(arguments)
    dist.barrier()
