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

from conda_dist.kinds import Kind, kinds

import conda_dist
from conda_dist.replaced import DEEPSPEED

_engine: ContextVar[Any] = ContextVar("engine that configures its optimizer", default=None)
_saving: ContextVar[str | None] = ContextVar("that all ranks save ZeRO's checkpoint", default=None)

ROUND_ROBIN = "DeepSpeed takes parameters from wrong places with round_robin_gradients"


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


def refuse(engine: Any) -> None:
    """Refuses what was not tried, before it can go wrong in silence.

    Raises:
        ValueError: the engine's config asks for it.
    """
    config, zero = engine._config, engine._config.zero_config
    offload, params = zero.offload_optimizer, zero.offload_param
    nvme = [o for o in (offload, params) if o is not None and o.device == "nvme"]
    twin = offload is not None and offload.ratio != 1.0
    reasons = {
        "offloading to NVMe resizes the states it swaps": bool(nvme),
        "super_offload replaces the optimizer's step": bool(offload and offload.super_offload),
        "offload_optimizer.ratio splits the step between two optimizers": twin,
        "zenflow replaces the optimizer's step": zero.zenflow is not None,
        "elastic_checkpoint saves moments without their bases": zero.elastic_checkpoint,
        "experts have data-parallel groups of their own": engine.has_moe_layers,
        "pipeline parallelism was not tried": engine.pipeline_parallelism,
        "a model-parallel mpu was not tried": engine.mpu is not None,
        "tensor parallelism was not tried": engine.autotp_size() > 1,
        "hierarchical partitions (hpZ) were not tried": zero.zero_hpz_partition_size > 1,
        "quantized weights or gradients were not tried": (
            zero.zero_quantized_weights
            or zero.zero_quantized_nontrainable_weights
            or zero.zero_quantized_gradients
        ),
        "its low-precision master weights lose the update": (
            engine.fp16_master_weights_and_gradients() or engine.bf16_master_weights_and_gradients()
        ),
        "load_universal is for ZeRO 1 to 3; what stage 0 saves loads on any number of ranks": (
            engine.load_universal_checkpoint() and not engine.zero_optimization()
        ),
        f"load_universal: {ROUND_ROBIN}": (
            engine.load_universal_checkpoint()
            and engine.zero_optimization_stage() in (1, 2)
            and engine.zero_round_robin_gradients()
        ),
        "DeepCompile was not tried": config.compile_config.deepcompile,
        "torch_autocast steps through a gradient scaler of its own": (
            config.torch_autocast_enabled
        ),
    }
    for reason, asked in reasons.items():
        if asked:
            raise ValueError(
                f"Conda does not support this DeepSpeed config: {reason}. Leave it out, or use "
                "another optimizer."
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
        token = _engine.set(self)
        try:
            if isinstance(client_optimizer, ours):
                client_optimizer.attach(Known.of(self))
            elif isinstance(client_optimizer, conda_dist.Conda) and self.zero_optimization():
                raise ValueError(
                    "deepspeed.initialize got a conda_dist.Conda, which cannot step on the flat "
                    f"partitions of ZeRO stage {self.zero_optimization_stage()}. Either {DEEPSPEED}"
                )
            return configure(self, client_optimizer, model_parameters)
        finally:
            _engine.reset(token)

    DeepSpeedEngine._configure_optimizer = knowing


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
