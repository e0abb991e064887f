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

from conda_dist.rules.states import has_own

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
"""Parameters with their names and groups, from :func:`conda_dist.parameter_names.each`."""


def _ways(title: str) -> str:
    """What to do under DeepSpeed; ``title``: the optimizer's class."""
    if title == "Conda":
        return f"either {DEEPSPEED}."
    return (
        f"{title} is not supported, and Conda alone is: use conda_dist.integrations.deepspeed.Conda"
        ", or FSDP2."
    )


def refuse_flat(named: Named, title: str = "Conda") -> None:
    """Refuses flat parameters that say of themselves that they hold the elements of others.

    Args:
        named: the parameters in the groups.
        title: the optimizer's class.

    Raises:
        ValueError: there is such a parameter.
    """
    pairs = [(name, param) for name, param, _ in named]
    _refuse_fsdp1(pairs, title)
    for name, param in pairs:
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if hasattr(param, "ds_id") and shape != tuple(param.shape):
            raise ValueError(
                f"{name}: ZeRO stage 3 has partitioned it, which is of shape {shape}, and "
                f"conda_dist.{title} cannot step on the flat partitions of ZeRO. Under DeepSpeed, "
                f"{_ways(title)}"
            )


def flat_error(name: str, param: Tensor, title: str) -> ValueError:
    """The error of a flat parameter that has taken the place of matrices."""
    return ValueError(
        f"{name}: there is a flat parameter of shape {tuple(param.shape)} where the optimizer "
        f"was given a matrix. {title} steps matrices, and not parts of them in one dimension. "
        f"Under DeepSpeed, {_ways(title)} Otherwise, {FSDP}."
    )


def _refuse_fsdp1(pairs: Sequence[tuple[str, Tensor]], title: str) -> None:
    """Refuses what FullyShardedDataParallel makes of parameters."""
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
            f"{tuple(param.shape)}, and may hold parts of matrices, which {title} cannot step; "
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
    fresh = [(n, p) for n, p in pairs if p.requires_grad and not has_own(state.get(p, {}))]
    shapes = {tuple(param.shape) for param in lost}
    sharded = any(isinstance(p, DTensor) and tuple(p.shape) in shapes for _, p in fresh)
    if fresh and (sharded or len(fresh) == sum(p.requires_grad for _, p in pairs)):
        raise ValueError(
            f"{fresh[0][0]}: it has no state, but there is state of {len(lost)} tensors that are "
            "in no parameter group any more: the parameters were replaced after their state was "
            f"made or loaded, and it would be lost. {ORDER}. If you mean to start afresh, drop the "
            "old state: optimizer.state.clear()."
        )


def refuse_removed(named: Named, state: Mapping[Any, Any]) -> None:
    """Refuses to save state of parameters that were taken out of the groups.

    Raises:
        ValueError: there is such a state, for which a state dict has no place.
    """
    held = {id(param) for _, param, _ in named}
    removed = [key for key in state if isinstance(key, Tensor) and id(key) not in held]
    if removed:
        shapes = ", ".join(str(tuple(param.shape)) for param in removed[:3])
        raise ValueError(
            f"there is state of {len(removed)} parameters that were taken out of the parameter "
            f"groups, of shapes {shapes}. Put them back, or drop their states, as by "
            "optimizer.state.pop(param)."
        )


def refuse_strangers(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses parameters without gradients that have been replaced, in the model alone.

    Looked for where a first step finds parameters without gradients, for it takes time.

    Args:
        named: the trainable parameters without a gradient, with their names.

    Raises:
        RuntimeError: no module has some of them any more, and a model's sharded parameters of the
            same shapes have gradients.
    """
    strangers = _plain(named)
    if not strangers:
        return
    gc.collect()  # models of the past may be waiting for it
    held, alive = _look_around()
    strangers = [(name, param) for name, param in strangers if id(param) not in held]
    if not any(param.ndim > 1 for _, param in strangers):
        return
    missing = Counter(tuple(param.shape) for _, param in strangers)
    flat, sharded = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for thing in alive:
        if thing.grad is None:
            continue
        if getattr(thing, "_is_flat_param", False):
            flat.update(map(tuple, getattr(thing, "_shapes", ())))
        elif isinstance(thing, DTensor) and thing.requires_grad:
            sharded[tuple(thing.shape)] += 1
    dtensors = "fully_shard or parallelize_module"
    for there, what in ((sharded, dtensors), (flat, "FullyShardedDataParallel")):
        if missing <= there:
            advice = f"Instead of FSDP1, {FSDP}" if what.startswith("Fully") else ORDER
            raise RuntimeError(
                f"{strangers[0][0]}: it has no gradient, but a parameter of its shape that {what} "
                "has put into its place in the model has one: this optimizer would train "
                f"nothing. {advice}."
            )


def refuse_unheld(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses to save the state of parameters that sharding has replaced in their modules.

    torch.distributed.checkpoint would not find their names. For a distributed job: it takes time.

    Args:
        named: the trainable parameters, with their names.

    Raises:
        ValueError: no module has some of them any more, but modules have shards of their shapes.
    """
    plain = _plain(named)
    for attempt in range(2 if plain else 0):
        held, _ = _look_around()
        unheld = [(name, param) for name, param in plain if id(param) not in held]
        missing = Counter(tuple(param.shape) for _, param in unheld)
        sharded = Counter(tuple(p.shape) for p in held.values() if isinstance(p, DTensor))
        if not unheld or not missing <= sharded:
            return
        if not attempt:
            gc.collect()  # models of the past may be waiting for it
    if plain:
        name, param = unheld[0]
        raise ValueError(
            f"{name}: no module has it any more, of shape {tuple(param.shape)}, but a module has "
            "a sharded parameter of its shape: the parameters were replaced after the optimizer "
            f"was made, and its state is not theirs. {ORDER}."
        )


def _plain(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Those that are not sharded, if there are matrices among them."""
    plain = [(name, param) for name, param in named if not isinstance(param, DTensor)]
    return plain if any(param.ndim > 1 for _, param in plain) else []


def _look_around() -> tuple[dict[int, Tensor], list[nn.Parameter]]:
    """The parameters that modules have, by id, and all the parameters there are."""
    held: dict[int, Tensor] = {}
    alive: list[nn.Parameter] = []
    for thing in gc.get_objects():
        # By its type, for objects of others may do anything when they are asked for theirs.
        if issubclass(type(thing), nn.Module):
            own = list(thing.__dict__.get("_parameters", {}).values())
            held |= {id(param): param for param in own if isinstance(param, Tensor)}
        elif issubclass(type(thing), Tensor) and isinstance(thing, nn.Parameter):
            alive.append(thing)
    return held, alive
