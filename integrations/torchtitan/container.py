"""Layer: integrations. torchtitan's optimizer container and its config, extended by Conda."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive
from torchtitan.models.common import FusedQKVLinear
from torchtitan.tools.logging import logger

from conda_dist.optimizer import Conda
from conda_dist.options import OPTIONS
from conda_dist.report import as_text
from conda_dist.routing import ADAMW, clean_name, group_by_view, no_matrix_message, route_model
from conda_dist.runtime.collectives import Mesh, all_max
from conda_dist.runtime.diagnostics import scalars
from conda_dist.runtime.errors import agree

_CondaOptions: Any = make_dataclass(
    "_CondaOptions",
    [
        (
            name,
            Annotated[option.config_type, tyro.conf.arg(help=option.config_help)],
            option.config_default,
        )
        for name, option in OPTIONS.items()
    ],
    bases=(OptimizersContainer.Config,),
    kw_only=True,
    slots=True,
)
"""torchtitan's optimizer config with a field for each of Conda's options."""


class CondaOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """Holds one :class:`conda_dist.Conda` for each model part, or torchtitan's own optimizers.

    Args:
        config: the config.
        model_parts: the model, or this rank's pipeline stages, after parallelization.

    Raises:
        ValueError: on all ranks together: an option is out of range; a pattern matches no parameter
            of any stage; or no matrix of any stage takes the conda path.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_CondaOptions):  # type: ignore[misc]
        """torchtitan's optimizer config with Conda's options.

        ``param_groups`` and ``optimizer_factory_kwargs_by_name`` are for torchtitan's own
        optimizers; with Conda it is an error to change them. ``implementation`` has no effect on
        Conda. All fields that are not described here are arguments of :class:`conda_dist.Conda`.
        """

        name: Literal["stock", "conda"] = "stock"
        """"conda", or "stock" for the optimizers that the config's param_groups name."""

        conda_params: list[str] = field(default_factory=list)
        """Patterns (see fnmatch) of names of parameters to put on the conda path in any case."""

        adamw_params: list[str] = field(default_factory=list)
        """Patterns of names of parameters to put on the adamw path."""

        splits: list[str] = field(default_factory=list)
        """Fused weights: "PATTERN=ROWS+ROWS+..." or "PATTERN=PARTS"; see param_groups. torchtitan's
        ``wqkv`` is split into q, k and v by default; "*.wqkv.weight=1" keeps it one matrix."""

        _stock: Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress] = None
        """The torchtitan config that this was made from, before the command line changed it."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self._config = config
        if config.name not in ("stock", "conda"):
            raise ValueError(
                f"--optimizer.name {config.name} is not supported under torchtitan: of "
                "conda_dist's optimizers, only Conda is"
            )
        if config.name == "conda":
            if config.implementation == "fused_opt_states_bf16":
                raise ValueError(
                    "--optimizer.implementation fused_opt_states_bf16 is for torchtitan's own "
                    "optimizers; --optimizer.state_dtype bfloat16 gives Conda bfloat16 moments"
                )
            _refuse_stock_options(config)
            _check_stages(config, model_parts)
        else:
            _refuse_conda_options(config)
        super().__init__(config, model_parts=model_parts)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Conda):
                _log_table(optimizer)
                optimizer.register_step_post_hook(_diagnostics_logger())

    def _build_param_groups(
        self, model: nn.Module, param_group_configs: Sequence[Any], impl_kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        """The groups of one model part. A pipeline stage may have parameters of one path only."""
        config = self._config
        if config.name == "stock":
            built: tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]] = (
                super()._build_param_groups(model, param_group_configs, impl_kwargs)
            )
            return built
        routed = route_model(model, config.conda_params, config.adamw_params)
        given = _parse_splits(config.splits)
        # Put the user's patterns first, where they win, and keep their values for equal patterns.
        by_view, _ = group_by_view(routed, {**given, **_fused_qkv(model), **given})
        parts = [(view.group_keys(), named) for view, named in by_view.items()]
        groups = []
        for keys, named in (*parts, ({"algorithm": ADAMW, "splits": None}, routed.adamw)):
            trainable = [(canonical_fqn(n), param) for n, param in named if param.requires_grad]
            if trainable:  # torchtitan stores names and parameters in separate lists
                names, params = map(list, zip(*trainable, strict=True))
                groups.append({"params": params, "param_names": names, **keys})
        return {"Conda": groups}, {"Conda": [f"{group['algorithm']} path" for group in groups]}

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        """What makes the optimizer of a model part: Conda, or torchtitan's own optimizer."""
        if self._config.name == "stock":
            if name.lower() == "conda":
                raise ValueError(
                    f"optimizer_name {name!r} is none of torchtitan's own optimizers: add "
                    "--optimizer.name conda, and leave the parameter groups to Conda"
                )
            factory: Callable[..., torch.optim.Optimizer] = super()._resolve_optimizer_factory(name)
            return factory
        config = self._config
        options = {name: getattr(config, name) for name in OPTIONS}
        return lambda groups: Conda(groups, **options)


def conda_config(config: Any, stock: Any = None, **options: Any) -> CondaOptimizersContainer.Config:
    """Converts a torchtitan optimizer config into a :class:`CondaOptimizersContainer.Config`.

    Args:
        config: an ``OptimizersContainer.Config``.
        stock: the config before a command line changed it; by default ``config``.
        options: fields to set.

    Raises:
        ValueError: the config belongs to another container, such as TorchFT's, or there is no such
            field.
    """
    known = (OptimizersContainer.Config, CondaOptimizersContainer.Config)
    if type(config) not in known:
        raise ValueError(
            f"--optimizer.name conda replaces torchtitan's own OptimizersContainer, but this "
            f"config's optimizer is a {type(config).__qualname__} "
            f"({type(config).__module__}), which changes the optimizer's step and state and was "
            "not tried with Conda. Use a config without it."
        )
    before = getattr(config, "_stock", None) or stock or config
    converted: CondaOptimizersContainer.Config = derive(
        config, CondaOptimizersContainer.Config, _stock=deepcopy(before), **options
    )
    return converted


def _parse_splits(given: Sequence[str]) -> dict[str, int | list[int]]:
    """Converts the splits of a command line for :func:`conda_dist.param_groups`.

    Raises:
        ValueError: one does not have the form "PATTERN=ROWS+ROWS" or "PATTERN=PARTS".
    """
    splits: dict[str, int | list[int]] = {}
    for text in given:
        pattern, _, rows = text.rpartition("=")
        try:
            numbers = [int(number) for number in rows.split("+")]
        except ValueError:
            numbers = []
        if not pattern or not numbers or min(numbers) < 1:
            raise ValueError(
                f"--optimizer.splits {text!r}: give PATTERN=ROWS+ROWS+... or PATTERN=PARTS, such "
                "as '*.w13.weight=2', or '*.wqkv.weight=512+128+128' for a block that repeats"
            )
        splits[pattern] = numbers if len(numbers) > 1 else numbers[0]
    return splits


def _fused_qkv(model: nn.Module) -> dict[str, int | list[int]]:
    """The splits of torchtitan's ``wqkv``: rows of queries, of a key and of a value per kv head."""
    return {
        f"{clean_name(name)}.wqkv.weight": [
            module.heads_per_kv * module.head_dim,
            module.head_dim,
            module.head_dim,
        ]
        for name, module in model.named_modules()
        if isinstance(module, FusedQKVLinear)
    }


def _check_stages(config: CondaOptimizersContainer.Config, parts: Sequence[nn.Module]) -> None:
    """Checks patterns and the conda path over all pipeline stages, on all ranks together.

    One stage may have no matrix, or no parameter that a pattern matches; all of them together must.
    """
    world = Mesh() if dist.group.WORLD is None else Mesh.of_group(dist.group.WORLD)
    splits = _parse_splits(config.splits)
    patterns = [*config.conda_params, *config.adamw_params, *splits]
    matched, projected, error = set[str](), False, None
    for part in parts:
        try:
            routed = route_model(part, config.conda_params, config.adamw_params)
            matched |= set(patterns) - {*routed.unmatched, *group_by_view(routed, splits)[1]}
        except Exception as caught:  # tell the other ranks first
            error = caught
            break
        projected |= any(param.requires_grad for _, param in routed.conda)
    agree(world, [], error)
    *found, projected_anywhere = all_max(world, [*(p in matched for p in patterns), projected])
    names = [pair for part in parts for pair in part.named_parameters()]
    for pattern, anywhere in zip(patterns, found, strict=True):
        if not anywhere:
            raise ValueError(
                f"pattern {pattern!r} matches no such parameter of any pipeline stage; names look "
                f"like {', '.join(repr(clean_name(name)) for name, _ in names[:3])}"
            )
    if not projected_anywhere:
        advice = (
            "Name weights with --optimizer.conda_params, or fewer with --optimizer.adamw_params"
        )
        raise ValueError(no_matrix_message(names, advice))


def _refuse_conda_options(config: CondaOptimizersContainer.Config) -> None:
    """Refuses Conda's options for torchtitan's own optimizers, which would ignore them."""
    default = CondaOptimizersContainer.Config()
    theirs = {f.name for f in fields(OptimizersContainer.Config)}
    for name in (f.name for f in fields(default) if f.name not in {*theirs, "_stock"}):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"--optimizer.{name} is an option of Conda's: add --optimizer.name conda to use it"
            )


def _refuse_stock_options(config: CondaOptimizersContainer.Config) -> None:
    """Refuses options of torchtitan's own optimizers for Conda, which would ignore them."""
    stock = config._stock or OptimizersContainer.Config()
    for name in ("param_groups", "optimizer_factory_kwargs_by_name"):
        ours, theirs = (dict(_leaves(name, getattr(c, name))) for c in (config, stock))
        changed = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if not changed:
            continue
        option, value = changed[0].replace("_", "-"), ours.get(changed[0])
        own = changed[0].rpartition(".")[2]
        instead = f"Give --optimizer.{own} (or {own!r} to the override). " * (own in OPTIONS)
        raise ValueError(
            f"--optimizer.{option} ({value!r}) is an option of torchtitan's own optimizers, and "
            f"Conda would ignore it. {instead}Leave it out, or leave Conda out."
        )
    if config.implementation != "fused":
        logger.info(
            "--optimizer.implementation %s has no effect on Conda, which has one implementation",
            config.implementation,
        )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values inside lists, dicts and dataclasses with their names on a command line."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    elif hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(f"{name}.{key}", item)


def _log_table(optimizer: Conda) -> None:
    """Logs the report, once for each model part: on the first rank that has it."""
    if not optimizer.is_first:
        return
    table = optimizer.report(show=False)
    logger.info("Conda's parameters\n%s", as_text(table))


def _diagnostics_logger() -> Callable[..., None]:
    """A hook after each step that logs what the step has collected, as :func:`_log_table` does."""
    logged = 0

    def log(optimizer: Conda, *_: Any) -> None:
        nonlocal logged
        before, logged = logged, optimizer.diagnostics_step
        if logged not in (before, 0) and optimizer.is_first:
            found = scalars(optimizer.diagnostics(summed=True))
            said = "  ".join(f"{name}: {value:.4g}" for name, value in found.items())
            logger.info("Conda's diagnostics, step %d:  %s", logged, said)

    return log
