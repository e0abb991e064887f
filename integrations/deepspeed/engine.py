"""Layer: integrations. How DeepSpeed's engine comes to know Conda, and what it tells in return."""

import functools
import os
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from conda_dist.integrations.deepspeed.arguments import PATTERNS, SPLITS, describe
from conda_dist.layer_kinds import Kind, kinds
from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.optimizer import Conda as PlainConda
from conda_dist.options import OPTIONS
from conda_dist.replaced_parameters import DEEPSPEED

_engine: ContextVar[Any] = ContextVar("engine that configures its optimizer", default=None)
_saving: ContextVar[str | None] = ContextVar("that all ranks save ZeRO's checkpoint", default=None)

ROUND_ROBIN = "DeepSpeed takes parameters from wrong places with round_robin_gradients"
NVME = "offloading to NVMe resizes the states it swaps"
LOST = "low-precision master weights lose the update"
EXPERTS = "experts have data-parallel groups of their own"
QUANTIZED = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
WAYS = f"Either {DEEPSPEED}."


@dataclass(frozen=True, slots=True)
class Known:
    """What an engine knows of the parameters of its optimizer.

    Attributes:
        names: the parameters' names.
        kinds: what the model's modules say of them, by id.
        replicas: at stage 0 the ranks whose copies and gradients are equal.
    """

    names: dict[Tensor, str] = field(default_factory=dict)
    kinds: dict[int, Kind] = field(default_factory=dict)
    replicas: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, engine: Any) -> "Known":
        """What this engine knows.

        Raises:
            ValueError: its config asks for something that Conda does not support.
        """
        refuse(engine)
        group = engine.seq_data_parallel_group
        return cls(dict(engine.param_names), kinds(engine.module), group)


def current() -> Known | None:
    """What is known from the engine that is making its optimizer, if one is."""
    engine = _engine.get()
    return None if engine is None else Known.of(engine)


def saving() -> str | None:
    """Whether the engine asks for a state dict, on all ranks, to write ZeRO's checkpoint.

    Returns:
        None if it does not; else why that could not become a universal one, "" if it can.
    """
    return _saving.get()


def section() -> str:
    """What to call the place of arguments in errors; "" if they are not the JSON's."""
    engine = _engine.get()
    given_by_json = engine is not None and engine.client_optimizer is None
    return "DeepSpeed JSON, optimizer.params: " if given_by_json else ""


def refuse(engine: Any) -> None:
    """Refuses what was not tried, before it can go wrong in silence.

    Raises:
        ValueError: the engine's config asks for it.
    """
    _refuse_section(engine)
    config, zero = engine._config, engine._config.zero_config
    offload, universal = zero.offload_optimizer, engine.load_universal_checkpoint()
    low = "_master_weights_and_grads"
    asked: list[tuple[Any, str, str]] = [
        *(
            (o is not None and o.device == "nvme", f'{name}.device "nvme"', NVME)
            for name, o in (
                ("zero_optimization.offload_optimizer", offload),
                ("zero_optimization.offload_param", zero.offload_param),
            )
        ),
        (
            offload and offload.super_offload,
            "zero_optimization.offload_optimizer.super_offload",
            "it replaces the optimizer's step",
        ),
        (
            offload and offload.ratio != 1.0,
            "zero_optimization.offload_optimizer.ratio",
            "below 1 it splits the step between two optimizers",
        ),
        (zero.zenflow, "zero_optimization.zenflow", "it replaces the optimizer's step"),
        (
            zero.elastic_checkpoint,
            "zero_optimization.elastic_checkpoint",
            "it saves moments without their bases",
        ),
        (
            zero.zero_hpz_partition_size > 1,
            "zero_optimization.zero_hpz_partition_size",
            "hierarchical partitions were not tried",
        ),
        *(
            (getattr(zero, name), f"zero_optimization.{name}", "quantization was not tried")
            for name in QUANTIZED
        ),
        (engine.fp16_master_weights_and_gradients(), f"fp16.fp16{low}", LOST),
        (engine.bf16_master_weights_and_gradients(), f"bf16.bf16{low}", LOST),
        (
            universal and not engine.zero_optimization(),
            "checkpoint.load_universal",
            "it is for ZeRO 1 to 3; what stage 0 saves loads on any number of ranks",
        ),
        (
            universal
            and engine.zero_optimization_stage() in (1, 2)
            and engine.zero_round_robin_gradients(),
            "checkpoint.load_universal with zero_optimization.round_robin_gradients",
            ROUND_ROBIN,
        ),
        (config.compile_config.deepcompile, "compile.deepcompile", "DeepCompile was not tried"),
        (
            config.torch_autocast_enabled,
            "torch_autocast",
            "it steps through a gradient scaler of its own",
        ),
        (engine.autotp_size() > 1, "tensor_parallel", "tensor parallelism was not tried"),
        # These are asked for by the script, not by the JSON.
        (engine.has_moe_layers, "a model with MoE layers of DeepSpeed's", EXPERTS),
        (engine.pipeline_parallelism, "a PipelineModule", "pipeline parallelism was not tried"),
        (engine.mpu is not None, "an mpu", "model parallelism was not tried"),
    ]
    for wanted, key, reason in asked:
        if wanted:
            raise ValueError(
                f"Conda does not support {key} in this DeepSpeed config: {reason}. Leave it out, "
                "or use another optimizer."
            )


def _refuse_section(engine: Any) -> None:
    """Refuses what stands in the JSON's section of the optimizer and is read by nobody.

    Raises:
        ValueError: there is something.
    """
    section = dict(engine._config._param_dict.get("optimizer") or {})
    kind, _ = section.pop("type", None), section.pop("params", None)
    if engine.client_optimizer is not None:
        if kind is not None:
            raise ValueError(
                f'the DeepSpeed JSON\'s optimizer (type "{kind}") is read by nobody, since the '
                "script gives deepspeed.initialize an optimizer. Take one of the two out."
            )
        return
    if section:
        known = [*OPTIONS, *PATTERNS, SPLITS]
        names = ", ".join(
            f"{key!r}{' (put it into params)' if key in known else describe(key, ())}"
            for key in section
        )
        raise ValueError(
            f"DeepSpeed JSON, optimizer: {names} would be read by nobody. Beside type and params "
            "there is nothing that Conda takes."
        )


def refuse_client(engine: Any, optimizer: Any) -> None:
    """Refuses a script's optimizer that is not what somebody who asked for Conda would think.

    Raises:
        ValueError: a :class:`conda_dist.Conda` under ZeRO, which flattens the parameters, or
            another rule's optimizer; what
            Accelerate has made of a Conda; or anything else than the Conda of the JSON.
    """
    if (name := str(engine._config.optimizer_name)).lower() == "conda":
        raise ValueError(
            f'the DeepSpeed JSON\'s optimizer (type "{name}") is read by nobody, since the script '
            f"gives deepspeed.initialize one ({type(optimizer).__name__}). Take one of the two out."
        )
    zero = engine.zero_optimization()
    plain = isinstance(optimizer, PlainConda) and zero
    # GaLore's groups have an interval, too, but also a rank; Adam's own have neither.
    replaced = type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS and any(
        "update_proj_gap" in group and "rank" not in group for group in optimizer.param_groups
    )
    if isinstance(optimizer, MatrixOptimizer) and zero and not plain:
        raise ValueError(
            f"{type(optimizer).__name__} is not supported under ZeRO, at stage "
            f"{engine.zero_optimization_stage()}: of conda_dist's optimizers Conda alone steps the "
            "flat partitions that it makes of parameters. Use that, or FSDP2."
        )
    if plain:
        raise ValueError(
            "conda_dist.Conda cannot step the flat partitions that ZeRO makes of parameters, at "
            f"stage {engine.zero_optimization_stage()}. {WAYS}"
        )
    if replaced:
        raise ValueError(
            f"the optimizer, {type(optimizer).__name__}, was made of a Conda, as Accelerate does "
            'where offload_optimizer is on. Add "zero_force_ds_cpu_optimizer": false to the '
            f"DeepSpeed JSON, so that the optimizer stays what it is. {WAYS}"
        )


def register() -> None:
    """Makes Conda known: to the JSON's "type" and to the engine's list of optimizers for ZeRO."""
    from conda_dist.integrations.deepspeed.optimizer import Conda

    if Conda in ZERO_SUPPORTED_OPTIMIZERS:
        return
    ZERO_SUPPORTED_OPTIMIZERS.append(Conda)
    for name in ("Conda", "conda"):  # where the engine looks for types it does not know
        setattr(torch.optim, name, Conda)
    _wrap_configuring(Conda)
    _wrap_checkpoints(Conda)


def _wrap_configuring(ours: type[Any]) -> None:
    """Has optimizers know the engine that is configured."""
    configure = DeepSpeedEngine._configure_optimizer

    @functools.wraps(configure)
    def knowing(self: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        def made(params: Any) -> Any:
            optimizer = client_optimizer(params)
            refuse_client(self, optimizer)
            return optimizer

        token = _engine.set(self)
        try:
            if isinstance(client_optimizer, ours):
                client_optimizer.attach(Known.of(self))
            elif isinstance(client_optimizer, torch.optim.Optimizer):
                refuse_client(self, client_optimizer)
            given = made if _is_factory(client_optimizer) else client_optimizer
            return configure(self, given, model_parameters)
        finally:
            _engine.reset(token)

    DeepSpeedEngine._configure_optimizer = knowing


def _is_factory(client_optimizer: Any) -> bool:
    """Whether the script gave what makes an optimizer, which the engine calls."""
    return callable(client_optimizer) and not isinstance(client_optimizer, torch.optim.Optimizer)


def _wrap_checkpoints(ours: type[Any]) -> None:
    """Has optimizers know when ZeRO's checkpoints are written, and universal ones loaded."""
    save, load = DeepSpeedEngine._save_zero_checkpoint, DeepSpeedEngine._load_zero_checkpoint

    @functools.wraps(save)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        shuffled = self.zero_optimization_stage() in (1, 2) and self.zero_round_robin_gradients()
        token = _saving.set(ROUND_ROBIN if shuffled else "" if self.zero_optimization() else None)
        try:
            return save(self, *args, **kwargs)
        finally:
            _saving.reset(token)

    @functools.wraps(load)
    def telling(
        self: Any, load_dir: Any, tag: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> Any:
        optimizer: Any = self.basic_optimizer
        if not isinstance(optimizer, ours) or not self.load_universal_checkpoint():
            return load(self, load_dir, tag, load_optimizer_states, **kwargs)
        with optimizer.loading(os.path.join(load_dir, str(tag)), load_optimizer_states):
            return load(self, load_dir, tag, load_optimizer_states, **kwargs)

    DeepSpeedEngine._save_zero_checkpoint = asking
    DeepSpeedEngine._load_zero_checkpoint = telling
