"""Parameters that a framework has replaced: by flat ones, or after their state was made.

The matrices that Conda projects must keep their shapes, and its groups must hold the parameters
that are trained.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FSDP = (
    "shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the shapes of "
    "its parameters, and make the optimizer from the sharded model"
)
DEEPSPEED = (
    'let the engine make the optimizer, from the JSON entry "optimizer": {"type": "Conda"} after '
    "import conda_dist.integrations.deepspeed, or give deepspeed.initialize a "
    "conda_dist.integrations.deepspeed.Conda(model.named_parameters()), which knows the engine's "
    "partitions"
)
ORDER = (
    "First replace the parameters (fully_shard, accelerator.prepare, parallelize_module), then "
    "make the optimizer from model.named_parameters(), then load its state and train"
)

Named = Iterable[tuple[str, Tensor, Mapping[str, Any]]]
"""Parameters with their names and their groups, as :func:`conda_dist.names.each` gives them."""


def refuse_flat(named: Named) -> None:
    """Refuses parameters that FSDP1 or ZeRO stage 3 has marked as flat.

    Raises:
        ValueError: there is such a parameter.
    """
    pairs = [(name, param) for name, param, _ in named]
    _refuse_fsdp1(pairs)
    for name, param in pairs:
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if hasattr(param, "ds_id") and shape != tuple(param.shape):
            raise ValueError(
                f"{name}: ZeRO stage 3 has partitioned it, which is of shape {shape}, and "
                "conda_dist.Conda cannot step on the flat partitions of ZeRO. Either "
                f"{DEEPSPEED}."
            )


def flat_error(name: str, param: Tensor) -> ValueError:
    """The error of a flat parameter that has taken the place of matrices."""
    return ValueError(
        f"{name}: there is a flat parameter of shape {tuple(param.shape)} where the optimizer "
        "was given a matrix. Conda projects matrices, and not parts of them in one dimension. "
        f"Under DeepSpeed, either {DEEPSPEED}. Otherwise, {FSDP}."
    )


def _refuse_fsdp1(pairs: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses the parameters that FullyShardedDataParallel (FSDP1) makes."""
    marked = [(n, p) for n, p in pairs if getattr(p, "_fsdp_flattened", False)]
    flat = [(n, p) for n, p in pairs if getattr(p, "_is_flat_param", False)]
    # Unsharded ones (NO_SHARD, one rank) keep their shapes with use_orig_params.
    if not flat and marked and not any(param.ndim > 1 for _, param in marked):
        flat = marked
    if not flat:
        flat = [(n, p) for n, p in pairs if n.rpartition(".")[2].lstrip("_")[:10] == "flat_param"]
    if flat:
        name, param = flat[0]
        raise ValueError(
            f"{name}: it is a flat parameter of FullyShardedDataParallel (FSDP1), of shape "
            f"{tuple(param.shape)}, and may hold parts of matrices, which Conda cannot project; "
            f"with or without use_orig_params. Instead, {FSDP}."
        )


def refuse_lost_state(named: Named, state: Mapping[Any, Any]) -> None:
    """Refuses to go on with parameters whose state was left behind when they were replaced.

    Args:
        named: the parameters in the groups.
        state: ``optimizer.state``.

    Raises:
        ValueError: there is state of tensors that are in no group, and the parameters that have
            taken their places have none.
    """
    pairs = [(name, param) for name, param, _ in named]
    held = {id(param) for _, param in pairs}
    lost = [key for key in state if isinstance(key, Tensor) and id(key) not in held]
    if not lost:
        return
    fresh = [(n, p) for n, p in pairs if p.requires_grad and "exp_avg" not in state.get(p, {})]
    shapes = {tuple(param.shape) for param in lost}
    sharded = any(isinstance(p, DTensor) and tuple(p.shape) in shapes for _, p in fresh)
    if fresh and (sharded or len(fresh) == sum(p.requires_grad for _, p in pairs)):
        raise ValueError(
            f"{fresh[0][0]}: it has no state, but there is state of {len(lost)} tensors that are "
            "in no parameter group any more: the parameters were replaced after their state was "
            f"made or loaded, and it would be lost. {ORDER}. If you mean to start afresh, drop the "
            "old state: optimizer.state.clear()."
        )


def refuse_strangers(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses parameters that were replaced in the model, but not in the optimizer.

    Such parameters get no gradients. The search takes time, so it is made only when a first step
    finds parameters without gradients.

    Args:
        named: the trainable parameters without a gradient, with their names.

    Raises:
        RuntimeError: a model's sharded parameters of the same shapes have gradients.
    """
    strangers = [(name, param) for name, param in named if not isinstance(param, DTensor)]
    if not any(param.ndim > 1 for _, param in strangers):
        return
    missing = Counter(tuple(param.shape) for _, param in strangers)
    flat, sharded = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    gc.collect()  # drops earlier models that nobody uses any more
    for thing in gc.get_objects():
        # Ask for the type first: foreign objects may run any code in isinstance.
        if not issubclass(type(thing), Tensor) or not isinstance(thing, nn.Parameter):
            continue
        if thing.grad is None:
            continue
        if getattr(thing, "_is_flat_param", False):
            flat.update(map(tuple, getattr(thing, "_shapes", ())))
        elif isinstance(thing, DTensor) and thing.requires_grad:
            sharded[tuple(thing.shape)] += 1
    for there, what in ((sharded, "fully_shard"), (flat, "FullyShardedDataParallel")):
        if missing <= there:
            advice = f"Instead of FSDP1, {FSDP}" if what.startswith("Fully") else ORDER
            raise RuntimeError(
                f"{strangers[0][0]}: it has no gradient, but a parameter of its shape that {what} "
                "has put into its place in the model has one: this optimizer would train "
                f"nothing. {advice}."
            )
