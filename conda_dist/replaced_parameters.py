"""Errors for parameters that a framework has replaced.

Two things go wrong: a framework replaces matrices by flat parameters, which have no rows and
columns to project; or it replaces parameters after the optimizer was made or has state, and the
optimizer still holds the old ones.
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

NamedParameters = Iterable[tuple[str, Tensor, Mapping[str, Any]]]
"""(name, parameter, group) from :func:`conda_dist.parameter_names.named_parameters`."""


def _deepspeed_advice(title: str) -> str:
    """What to do under DeepSpeed; ``title``: the optimizer's class."""
    if title == "Conda":
        return f"either {DEEPSPEED}."
    return (
        f"only Conda is supported, not {title}: use conda_dist.integrations.deepspeed.Conda, or "
        "FSDP2."
    )


def refuse_flat(named: NamedParameters, title: str = "Conda") -> None:
    """Refuses flat parameters that FSDP1 or ZeRO-3 has marked as such.

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
                f"{name}: ZeRO stage 3 has partitioned it (its shape was {shape}), and "
                f"conda_dist.{title} cannot step on the flat partitions of ZeRO. Under DeepSpeed, "
                f"{_deepspeed_advice(title)}"
            )


def flat_error(name: str, param: Tensor, title: str) -> ValueError:
    """The error for a flat parameter that has replaced matrices."""
    return ValueError(
        f"{name}: there is a flat parameter of shape {tuple(param.shape)} where the optimizer "
        f"was given a matrix. {title} steps matrices, and cannot step flat parts of them. "
        f"Under DeepSpeed, {_deepspeed_advice(title)} Otherwise, {FSDP}."
    )


def _refuse_fsdp1(pairs: Sequence[tuple[str, Tensor]], title: str) -> None:
    """Refuses flat parameters, and views of them, of FullyShardedDataParallel."""
    views = [(n, p) for n, p in pairs if getattr(p, "_fsdp_flattened", False)]  # use_orig_params
    flat = [(n, p) for n, p in pairs if getattr(p, "_is_flat_param", False)]
    # If nothing is sharded (NO_SHARD, or one rank), views still are matrices.
    if not flat and views and not any(param.ndim > 1 for _, param in views):
        flat = views
    if not flat:
        flat = [(n, p) for n, p in pairs if n.rpartition(".")[2].lstrip("_")[:10] == "flat_param"]
    if flat:
        name, param = flat[0]
        raise ValueError(
            f"{name}: this is a flat parameter of FullyShardedDataParallel (FSDP1), of shape "
            f"{tuple(param.shape)}. It may hold parts of matrices, which {title} cannot step, "
            f"with or without use_orig_params. Instead, {FSDP}."
        )


def refuse_lost_state(named: NamedParameters, state: Mapping[Any, Any]) -> None:
    """Refuses parameters that have replaced parameters with state, and have no state themselves.

    Args:
        named: the parameters in the groups.
        state: ``optimizer.state``.

    Raises:
        ValueError: there is state of tensors that are in no group, and either a DTensor of the
            same shape has no state, or no trainable parameter has any.
    """
    pairs = [(name, param) for name, param, _ in named]
    in_groups = {id(param) for _, param in pairs}
    lost = [key for key in state if isinstance(key, Tensor) and id(key) not in in_groups]
    if not lost:
        return
    fresh = [(n, p) for n, p in pairs if p.requires_grad and not has_own(state.get(p, {}))]
    shapes = {tuple(param.shape) for param in lost}
    sharded = any(isinstance(p, DTensor) and tuple(p.shape) in shapes for _, p in fresh)
    if fresh and (sharded or len(fresh) == sum(p.requires_grad for _, p in pairs)):
        raise ValueError(
            f"{fresh[0][0]}: it has no state, but there is state of {len(lost)} tensors that are "
            "in no parameter group any more: the parameters were replaced after their state was "
            f"made or loaded, and it would be lost. {ORDER}. To start with fresh state, drop the "
            "old state: optimizer.state.clear()."
        )


def refuse_removed(named: NamedParameters, state: Mapping[Any, Any]) -> None:
    """Refuses to save the state of parameters that were removed from the groups.

    A state dict stores states by index in the groups, so it has no key for such a state.

    Raises:
        ValueError: there is such a state.
    """
    in_groups = {id(param) for _, param, _ in named}
    removed = [key for key in state if isinstance(key, Tensor) and id(key) not in in_groups]
    if removed:
        shapes = ", ".join(str(tuple(param.shape)) for param in removed[:3])
        raise ValueError(
            f"there is state of {len(removed)} parameters that were taken out of the parameter "
            f"groups, of shapes {shapes}. Put them back, or drop their states with "
            "optimizer.state.pop(param)."
        )


def refuse_strangers(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses parameters that a framework has replaced in the model but not in the groups.

    It searches all objects of the process, which takes time, so call it only if parameters have no
    gradients.

    Args:
        named: the trainable parameters without a gradient, with their names.

    Raises:
        RuntimeError: some of them are in no module, and sharded parameters of the same shapes have
            gradients.
    """
    strangers = _unsharded(named)
    if not strangers:
        return
    gc.collect()  # free models that are no longer used
    in_modules, alive = _find_parameters()
    strangers = [(name, param) for name, param in strangers if id(param) not in in_modules]
    if not any(param.ndim > 1 for _, param in strangers):
        return
    missing = Counter(tuple(param.shape) for _, param in strangers)
    flat, sharded = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for param in alive:
        if param.grad is None:
            continue
        if getattr(param, "_is_flat_param", False):
            flat.update(map(tuple, getattr(param, "_shapes", ())))
        elif isinstance(param, DTensor) and param.requires_grad:
            sharded[tuple(param.shape)] += 1
    fsdp1 = f"Instead of FSDP1, {FSDP}"
    for replacements, framework, advice in (
        (sharded, "fully_shard or parallelize_module", ORDER),
        (flat, "FullyShardedDataParallel", fsdp1),
    ):
        if missing <= replacements:
            raise RuntimeError(
                f"{strangers[0][0]}: it has no gradient, but {framework} has put another parameter "
                "of its shape into the model, which has one: this optimizer would train "
                f"nothing. {advice}."
            )


def refuse_unheld(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses to save the state of parameters that sharding has replaced in their modules.

    torch.distributed.checkpoint would not find the names of these parameters. It searches all
    objects of the process, which takes time.

    Args:
        named: the trainable parameters, with their names.

    Raises:
        ValueError: some of them are in no module, and modules have sharded parameters of the same
            shapes.
    """
    plain = _unsharded(named)
    for attempt in range(2 if plain else 0):
        in_modules, _ = _find_parameters()
        unheld = [(name, param) for name, param in plain if id(param) not in in_modules]
        missing = Counter(tuple(param.shape) for _, param in unheld)
        sharded = Counter(tuple(p.shape) for p in in_modules.values() if isinstance(p, DTensor))
        if not unheld or not missing <= sharded:
            return
        if not attempt:
            gc.collect()  # free models that are no longer used, and look again
    if plain:
        name, param = unheld[0]
        raise ValueError(
            f"{name}: no module has this parameter of shape {tuple(param.shape)} any more, but a "
            "module has a sharded parameter of its shape: the parameters were replaced after the "
            f"optimizer was made, and its state is not theirs. {ORDER}."
        )


def _unsharded(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The parameters that are no DTensors; none if there is no matrix among them."""
    plain = [(name, param) for name, param in named if not isinstance(param, DTensor)]
    return plain if any(param.ndim > 1 for _, param in plain) else []


def _find_parameters() -> tuple[dict[int, Tensor], list[nn.Parameter]]:
    """The parameters of all modules of the process, by id, and all parameters of the process."""
    in_modules: dict[int, Tensor] = {}
    alive: list[nn.Parameter] = []
    for thing in gc.get_objects():
        # Ask for its type: isinstance() reads __class__, and some objects run code for that.
        if issubclass(type(thing), nn.Module):
            own = list(thing.__dict__.get("_parameters", {}).values())
            in_modules |= {id(param): param for param in own if isinstance(param, Tensor)}
        elif issubclass(type(thing), Tensor) and isinstance(thing, nn.Parameter):
            alive.append(thing)
    return in_modules, alive
