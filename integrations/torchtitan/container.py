"""Layer: integrations. torchtitan's optimizer container with Conda in it, and its config."""

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
from conda_dist.routing import ADAMW, clean_name, divide, nothing_to_project, split
from conda_dist.runtime.collectives import Mesh, agree, all_max

_CondaOptions: Any = make_dataclass(
    "_CondaOptions",
    [
        (name, Annotated[option.config_type, tyro.conf.arg(help=option.help)], option.default)
        for name, option in OPTIONS.items()
    ],
    bases=(OptimizersContainer.Config,),
    kw_only=True,
    slots=True,
)
"""torchtitan's optimizer config, and a field for each of Conda's options."""


class CondaOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """One :class:`conda_dist.Conda` for each model part, or torchtitan's own optimizers.

    Args:
        config: the config.
        model_parts: the model, or the pipeline stages this rank holds, after parallelization.

    Raises:
        ValueError: an option is out of its range; a pattern matches no parameter of any stage; no
            matrix of any stage would be on the conda path. On all ranks alike.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_CondaOptions):  # type: ignore[misc]
        """torchtitan's optimizer config with Conda's options beside it.

        ``param_groups`` and ``optimizer_factory_kwargs_by_name`` are for torchtitan's own
        optimizers, and an error if they are changed for Conda. ``implementation`` makes no
        difference to Conda. The other arguments, if not described here, are those of
        :class:`conda_dist.Conda`.
        """

        name: Literal["stock", "conda"] = "stock"
        """"conda", or "stock" for the optimizers that the config's param_groups name."""

        conda_params: list[str] = field(default_factory=list)
        """Patterns (as of fnmatch) of parameters to project whatever their names say."""

        adamw_params: list[str] = field(default_factory=list)
        """Patterns of parameters to keep off the conda path."""

        splits: list[str] = field(default_factory=list)
        """Fused weights: "PATTERN=ROWS+ROWS+..." or "PATTERN=PARTS", as of param_groups. That q, k
        and v are fused in torchtitan's ``wqkv`` is known; "*.wqkv.weight=1" keeps it one matrix."""

        _stock: Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress] = None
        """The config that this was made of, as it was before the command line changed it."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self._config = config
        if config.name not in ("stock", "conda"):
            raise ValueError(
                f"--optimizer.name {config.name} is not supported under torchtitan: of "
                "conda_dist's optimizers Conda alone is"
            )
        if config.name == "conda":
            if config.implementation == "fused_opt_states_bf16":
                raise ValueError(
                    "--optimizer.implementation fused_opt_states_bf16 is for torchtitan's own "
                    "optimizers; Conda's moments are bfloat16 by --optimizer.state_dtype bfloat16"
                )
            _check_unread(config)
            _check_stages(config, model_parts)
        else:
            _check_unused(config)
        super().__init__(config, model_parts=model_parts)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Conda):
                _log_table(optimizer)

    def _build_param_groups(
        self, model: nn.Module, param_group_configs: Sequence[Any], impl_kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        """Groups by path, of any model part: a stage may have parameters of one path only."""
        config = self._config
        if config.name == "stock":
            built: tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]] = (
                super()._build_param_groups(model, param_group_configs, impl_kwargs)
            )
            return built
        divided = divide(model, config.conda_params, config.adamw_params)
        asked = _splits(config.splits)  # before what is known, and instead of it
        ways, _ = split(divided, {**asked, **_fused_qkv(model), **asked})
        parts = [(way.keys(), named) for way, named in ways.items()]
        groups = []
        for keys, named in (*parts, ({"algorithm": ADAMW, "splits": None}, divided.adamw)):
            trainable = [(canonical_fqn(n), param) for n, param in named if param.requires_grad]
            if trainable:  # names apart from parameters, as torchtitan has them
                names, params = map(list, zip(*trainable, strict=True))
                groups.append({"params": params, "param_names": names, **keys})
        return {"Conda": groups}, {"Conda": [f"{group['algorithm']} path" for group in groups]}

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        """Conda by its config; torchtitan's own by name."""
        if self._config.name == "stock":
            if name.lower() == "conda":
                raise ValueError(
                    f"optimizer_name {name!r} is none of torchtitan's own: add --optimizer.name "
                    "conda, with which Conda groups the parameters itself"
                )
            factory: Callable[..., torch.optim.Optimizer] = super()._resolve_optimizer_factory(name)
            return factory
        config = self._config
        options = {name: getattr(config, name) for name in OPTIONS}
        return lambda groups: Conda(groups, **options)


def conda_config(config: Any, stock: Any = None, **options: Any) -> CondaOptimizersContainer.Config:
    """A torchtitan optimizer config as one of :class:`CondaOptimizersContainer`.

    Args:
        config: an ``OptimizersContainer.Config``.
        stock: what it was before a command line changed it; by default it has not been.
        options: fields to set.

    Raises:
        ValueError: the config is of another container, whose ``step`` is not torchtitan's own
            (TorchFT's); or has no such field.
    """
    known = (OptimizersContainer.Config, CondaOptimizersContainer.Config)
    if type(config) not in known:
        raise ValueError(
            f"--optimizer.name conda replaces torchtitan's own OptimizersContainer, but this "
            f"config's optimizer is a {type(config).__qualname__} "
            f"({type(config).__module__}), which wraps the optimizer's step and state in its own "
            "way and was not tried with Conda. Use a config without it."
        )
    before = getattr(config, "_stock", None) or stock or config
    made: CondaOptimizersContainer.Config = derive(
        config, CondaOptimizersContainer.Config, _stock=deepcopy(before), **options
    )
    return made


def _splits(given: Sequence[str]) -> dict[str, int | list[int]]:
    """The splits of a command line as :func:`conda_dist.param_groups` takes them.

    Raises:
        ValueError: one is not of the form "PATTERN=ROWS+ROWS" or "PATTERN=PARTS".
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
    """How torchtitan fuses q, k and v: for each group of heads its queries, its key, its value."""
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
    """Raises on all ranks for what would be an error in a model that were not cut into stages."""
    world = Mesh() if dist.group.WORLD is None else Mesh.of_group(dist.group.WORLD)
    splits = _splits(config.splits)
    patterns = [*config.conda_params, *config.adamw_params, *splits]
    matched, projected, error = set[str](), False, None
    for part in parts:
        try:
            division = divide(part, config.conda_params, config.adamw_params)
            matched |= set(patterns) - {*division.unmatched, *split(division, splits)[1]}
        except Exception as caught:  # other stages need not know the parameter
            error = caught
            break
        projected |= any(param.requires_grad for _, param in division.conda)
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
        how = "Name weights with --optimizer.conda_params, or fewer with --optimizer.adamw_params"
        raise ValueError(nothing_to_project(names, how))


def _check_unused(config: CondaOptimizersContainer.Config) -> None:
    """Refuses options of Conda's that would be ignored."""
    default = CondaOptimizersContainer.Config()
    theirs = {f.name for f in fields(OptimizersContainer.Config)}
    for name in (f.name for f in fields(default) if f.name not in {*theirs, "_stock"}):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"--optimizer.{name} is an option of Conda's: add --optimizer.name conda to use it"
            )


def _check_unread(config: CondaOptimizersContainer.Config) -> None:
    """Refuses options of torchtitan's own optimizers that would be ignored."""
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
            f"--optimizer.{option} ({value!r}) is an option of torchtitan's own optimizers and "
            f"would be read by nobody with Conda. {instead}Leave it out, or leave Conda out."
        )
    if config.implementation != "fused":
        logger.info(
            "--optimizer.implementation %s makes no difference to Conda, which has one",
            config.implementation,
        )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in lists, dicts and dataclasses, with what a command line would call them."""
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
    """Logs what went where, once for each model part: on the first rank that holds it."""
    if not optimizer.is_first:
        return
    table = optimizer.report(show=False)
    logger.info("Conda's parameters\n%s", as_text(table))
