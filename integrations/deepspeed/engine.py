"""Layer: integrations. Registers Conda with DeepSpeed, and reads what it needs of the engine."""

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

from conda_dist.integrations.deepspeed.arguments import PATTERNS, SPLITS, describe_key
from conda_dist.layer_kinds import Kind, kinds_by_module
from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.optimizer import Conda as PlainConda
from conda_dist.options import OPTIONS
from conda_dist.replaced_parameters import DEEPSPEED

_engine: ContextVar[Any] = ContextVar("the engine that is making its optimizer", default=None)
_saving: ContextVar[str | None] = ContextVar("see zero_checkpoint_problem()", default=None)

# Reasons why an option is refused.
ROUND_ROBIN = "DeepSpeed takes parameters from wrong places with round_robin_gradients"
NVME = "offloading to NVMe resizes the states it swaps"
LOST = "low-precision master weights lose the update"
EXPERTS = "experts have data-parallel groups of their own"
QUANTIZED = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
USE_OURS = f"Either {DEEPSPEED}."


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the optimizer learns from DeepSpeed's engine.

    Attributes:
        names: names of the parameters.
        kinds: what the model's modules say about the parameters, by id.
        replicas: at stage 0: the ranks whose parameters and gradients are equal.
    """

    names: dict[Tensor, str] = field(default_factory=dict)
    kinds: dict[int, Kind] = field(default_factory=dict)
    replicas: dist.ProcessGroup | None = None

    @classmethod
    def read(cls, engine: Any) -> "EngineInfo":
        """Reads the information from an engine.

        Raises:
            ValueError: the engine's config has an option that Conda does not support.
        """
        refuse_unsupported(engine)
        group = engine.seq_data_parallel_group
        return cls(dict(engine.param_names), kinds_by_module(engine.module), group)


def current_engine_info() -> EngineInfo | None:
    """Information from the engine that is making its optimizer now; None if there is no such."""
    engine = _engine.get()
    return None if engine is None else EngineInfo.read(engine)


def zero_checkpoint_problem() -> str | None:
    """Why the checkpoint that the engine writes now cannot become a universal checkpoint.

    Returns:
        A reason, or "" if it can. Then all ranks ask for a state dict together. None if the engine
        is not writing a ZeRO checkpoint.
    """
    return _saving.get()


def errors_prefix() -> str:
    """The text that errors about arguments begin with: their place in the JSON, or ""."""
    engine = _engine.get()
    from_json = engine is not None and engine.client_optimizer is None
    return "DeepSpeed JSON, optimizer.params: " if from_json else ""


def refuse_unsupported(engine: Any) -> None:
    """Refuses options of DeepSpeed that Conda does not support or was not tried with.

    Raises:
        ValueError: the engine's config, its model or the script uses one.
    """
    _refuse_unread_json(engine)
    config, zero = engine._config, engine._config.zero_config
    offload, universal = zero.offload_optimizer, engine.load_universal_checkpoint()
    low = "_master_weights_and_grads"
    refused: list[tuple[Any, str, str]] = [  # whether it is used, its name, why it is refused
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
        # The script chooses these, not the JSON.
        (engine.has_moe_layers, "a model with MoE layers of DeepSpeed's", EXPERTS),
        (engine.pipeline_parallelism, "a PipelineModule", "pipeline parallelism was not tried"),
        (engine.mpu is not None, "an mpu", "model parallelism was not tried"),
    ]
    for used, key, reason in refused:
        if used:
            raise ValueError(
                f"Conda does not support {key} in this DeepSpeed config: {reason}. Leave it out, "
                "or use another optimizer."
            )


def _refuse_unread_json(engine: Any) -> None:
    """Refuses entries of the JSON's "optimizer" that DeepSpeed and Conda would ignore.

    Raises:
        ValueError: there is such an entry.
    """
    section = dict(engine._config._param_dict.get("optimizer") or {})
    kind, _ = section.pop("type", None), section.pop("params", None)
    if engine.client_optimizer is not None:
        if kind is not None:
            raise ValueError(
                f'the DeepSpeed JSON\'s optimizer (type "{kind}") is ignored, because the script '
                "gives deepspeed.initialize an optimizer. Remove one of the two."
            )
        return
    if section:
        known = [*OPTIONS, *PATTERNS, SPLITS]
        names = ", ".join(
            f"{key!r}{' (put it into params)' if key in known else describe_key(key, ())}"
            for key in section
        )
        raise ValueError(
            f"DeepSpeed JSON, optimizer: {names} would be ignored. Only type and params have an "
            "effect here."
        )


def refuse_client_optimizer(engine: Any, optimizer: Any) -> None:
    """Refuses an optimizer of the script if it cannot work, or if it is not the Conda asked for.

    Raises:
        ValueError: the JSON asks for Conda, too; or under ZeRO, which flattens parameters, it is
            :class:`conda_dist.Conda` or another optimizer of this package; or Accelerate has
            replaced a Conda by it.
    """
    if (name := str(engine._config.optimizer_name)).lower() == "conda":
        raise ValueError(
            f'the DeepSpeed JSON\'s optimizer (type "{name}") is ignored, because the script gives '
            f"deepspeed.initialize one ({type(optimizer).__name__}). Remove one of the two."
        )
    zero = engine.zero_optimization()
    plain = isinstance(optimizer, PlainConda) and zero
    # An Adam with Conda's groups was a Conda. GaLore's groups have this key, too, but also "rank".
    replaced = type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS and any(
        "update_proj_gap" in group and "rank" not in group for group in optimizer.param_groups
    )
    if isinstance(optimizer, MatrixOptimizer) and zero and not plain:
        raise ValueError(
            f"{type(optimizer).__name__} is not supported under ZeRO, at stage "
            f"{engine.zero_optimization_stage()}: of conda_dist's optimizers, only Conda can step "
            "ZeRO's flat partitions. Use Conda, or FSDP2."
        )
    if plain:
        raise ValueError(
            "conda_dist.Conda cannot step ZeRO's flat partitions of parameters, at stage "
            f"{engine.zero_optimization_stage()}. {USE_OURS}"
        )
    if replaced:
        raise ValueError(
            f"the optimizer, {type(optimizer).__name__}, has Conda's parameter groups: Accelerate "
            "replaces Conda in this way if offload_optimizer is on. Add "
            '"zero_force_ds_cpu_optimizer": false to the DeepSpeed JSON, so that Accelerate leaves '
            f"the optimizer alone. {USE_OURS}"
        )


def register() -> None:
    """Registers Conda for the JSON's "type", and in DeepSpeed's list of optimizers for ZeRO."""
    from conda_dist.integrations.deepspeed.optimizer import Conda

    if Conda in ZERO_SUPPORTED_OPTIMIZERS:
        return
    ZERO_SUPPORTED_OPTIMIZERS.append(Conda)
    for name in ("Conda", "conda"):  # the engine looks up unknown types in torch.optim
        setattr(torch.optim, name, Conda)
    _wrap_configuring(Conda)
    _wrap_checkpoints(Conda)


def _wrap_configuring(ours: type[Any]) -> None:
    """Wraps the method with which an engine makes its optimizer, so that Conda gets its info."""
    configure = DeepSpeedEngine._configure_optimizer

    @functools.wraps(configure)
    def configure_with_info(self: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        def make_checked(params: Any) -> Any:
            optimizer = client_optimizer(params)
            refuse_client_optimizer(self, optimizer)
            return optimizer

        token = _engine.set(self)
        try:
            if isinstance(client_optimizer, ours):
                client_optimizer.attach(EngineInfo.read(self))
            elif isinstance(client_optimizer, torch.optim.Optimizer):
                refuse_client_optimizer(self, client_optimizer)
            elif callable(client_optimizer):  # it makes an optimizer
                return configure(self, make_checked, model_parameters)
            return configure(self, client_optimizer, model_parameters)
        finally:
            _engine.reset(token)

    DeepSpeedEngine._configure_optimizer = configure_with_info


def _wrap_checkpoints(ours: type[Any]) -> None:
    """Wraps the methods that save and load ZeRO's checkpoints, so that Conda can add its bases."""
    save, load = DeepSpeedEngine._save_zero_checkpoint, DeepSpeedEngine._load_zero_checkpoint

    @functools.wraps(save)
    def save_with_bases(self: Any, *args: Any, **kwargs: Any) -> Any:
        shuffled = self.zero_optimization_stage() in (1, 2) and self.zero_round_robin_gradients()
        token = _saving.set(ROUND_ROBIN if shuffled else "" if self.zero_optimization() else None)
        try:
            return save(self, *args, **kwargs)
        finally:
            _saving.reset(token)

    @functools.wraps(load)
    def load_with_bases(
        self: Any, load_dir: Any, tag: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> Any:
        optimizer: Any = self.basic_optimizer
        if not isinstance(optimizer, ours) or not self.load_universal_checkpoint():
            return load(self, load_dir, tag, load_optimizer_states, **kwargs)
        with optimizer.loading(os.path.join(load_dir, str(tag)), load_optimizer_states):
            return load(self, load_dir, tag, load_optimizer_states, **kwargs)

    DeepSpeedEngine._save_zero_checkpoint = save_with_bases
    DeepSpeedEngine._load_zero_checkpoint = load_with_bases
