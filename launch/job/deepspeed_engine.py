"""The job's other engine: the same steps by DeepSpeed, ZeRO stages 0 to 3.

Importing this module imports DeepSpeed; `pretrain.py` does so only for a job that asks for it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from conda_dist.integrations.deepspeed import Conda  # which makes the JSON's type known, too
from conda_dist.launch.cluster.process_group import JobError, World, from_main, together
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.deepspeed_settings import build_settings, parameter_groups
from conda_dist.launch.job.engine import Engine, StepResult, Take
from conda_dist.launch.job.model import compute_dtype, initialised_model
from conda_dist.report import print_table

_TAG, _LAYOUT = "deepspeed", "deepspeed.json"


class DeepSpeedEngine(Engine):
    """A model under ZeRO and the optimizer that DeepSpeed makes of its JSON.

    In bfloat16 the master weights begin with the initial weights rounded to bfloat16, which is
    what DeepSpeed is given; in float32 they begin as under FSDP2.
    """

    def __init__(self, config: Config, vocab_size: int, world: World) -> None:
        """Builds everything at step 0; raises ConfigError for settings that DeepSpeed refuses."""
        settings = build_settings(config, world)
        deepspeed.utils.logger.setLevel("WARNING")
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        model = _build_model(config, vocab_size, settings)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(config, model, vocab_size),
                config=settings,
                dist_init_required=False,
            )
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            file = config.deepspeed.config
            source = f"the settings in {file}, or the job's" if file else "the job's settings"
            raise ConfigError(f"DeepSpeed does not take {source}: {error}") from error
        engine, own = self._engine, [self._engine.basic_optimizer]
        super().__init__(config, world, engine.module, engine, own, [engine.optimizer])
        self._files = engine.checkpoint_engine = _Files()
        self._gate = _Gate(engine)
        self._report = False

    def _held(self, optimizer: Optimizer) -> int:
        if isinstance(optimizer, Conda):  # under ZeRO its bases are not in its state
            return sum(row["state_bytes"] for row in optimizer.report())
        return super()._held(optimizer)

    def describe(self) -> dict[str, str]:
        """See Engine."""
        return {
            "engine": f"DeepSpeed {deepspeed.__version__}, ZeRO stage "
            f"{self._config.deepspeed.stage}",
            **super().describe(),
            "optimizer": type(self._engine.basic_optimizer).__name__,
        }

    def print_report(self) -> None:
        """See Engine. Conda learns in the first step where ZeRO keeps what, and says it then."""
        self._report = isinstance(self._engine.basic_optimizer, Conda)

    def _prepare(self, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over the ranks; the sum is what is wanted, since each rank's loss is
        # its share of the global mean.
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, take: Take) -> StepResult:
        """See Engine."""
        lr = self._set_rates()
        with self._stopwatch:
            skipped = self._step_through(take)
        if skipped is None and self._report:
            self._report = False
            print_table(self._engine.basic_optimizer.report())
        self._step += 1
        gate = self._gate
        return StepResult(gate.loss, gate.norm, lr, self._stopwatch.seconds, skipped)

    def _step_through(self, take: Take) -> str | None:
        """DeepSpeed's step. If it is skipped, where a number that is not finite came from."""
        skipped = None
        self._gate.close(take, self._loss)
        if self._engine.optimizer is self._engine.basic_optimizer:
            # Stage 0 in float32: nothing stands between the engine and the optimizer that would
            # know the norm.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._gate.decide(float(torch.nn.utils.get_total_norm(gradients)))
            skipped = None if self._gate.taken else self._where()
        self._engine.step()
        if self._gate.taken is None:  # held back by DeepSpeed; the norm is infinite then
            self._gate.decide(float(self._engine.get_global_grad_norm()))
        return None if self._gate.taken else skipped or self._where()

    def save(self, folder: Path) -> None:
        """See Engine. The files are DeepSpeed's own, in a folder of theirs."""
        layout = self._layout()
        from_main(
            self._world,
            f"writing {folder / _LAYOUT}",
            lambda: (folder / _LAYOUT).write_text(json.dumps(layout)),
        )
        self._files.error = None
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        with together(self._world, f"saving to {folder}"):
            if self._files.error is not None:
                raise self._files.error

    def load(self, folder: Path, step: int) -> None:
        """See Engine; on as many ranks and at the same stage only."""
        saved = from_main(
            self._world,
            "reading what the checkpoint was made by",
            lambda: json.loads((folder / _LAYOUT).read_text()),
        )
        here = self._layout()
        differing = [f"{key} {saved.get(key)} there, {here[key]} here" for key in here]
        if saved != here:
            raise JobError(
                f"ZeRO's files hold what single ranks have: {', '.join(differing)}. Start "
                f"{saved.get('ranks')} ranks with --deepspeed.stage {saved.get('stage')} "
                f"--training.compute_dtype {saved.get('dtype')}. On others this job cannot go on; "
                "what DeepSpeed's ds_to_universal makes of them, a script of your own can load"
            )
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._groups]
        # It may raise on one rank alone: no JobError, whose ranks wait for each other at the end.
        found, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if found is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")
        # Hyperparameters are the config's, not the checkpoint's.
        for group, own in zip(self._groups, settings, strict=True):
            group.update(own)
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = self._config.optimizer.chosen.grad_clip
        self._step = step

    def _layout(self) -> dict[str, Any]:
        """What two jobs must have in common to read each other's files."""
        dtype = compute_dtype(self._config.training, self._world.device)
        return {
            "ranks": self._world.size,
            "stage": self._config.deepspeed.stage,
            "dtype": str(dtype).removeprefix("torch."),
        }


class _Gate:
    """Has DeepSpeed's step update nothing, if that is decided once the gradient's norm is known.

    ZeRO computes the norm, and then calls the step of the optimizer that it has, once for each part
    of the parameters. These calls do nothing then, and ZeRO goes on with what it has.
    """

    def __init__(self, engine: Any) -> None:
        """Stands before the step of the engine's basic optimizer from here on."""
        self._zero, self._step = engine.optimizer, engine.basic_optimizer.step
        engine.basic_optimizer.step = self._pass
        self.taken: bool | None = None
        """Whether the step is taken; None as long as nothing has been decided."""
        self.loss = self.norm = math.nan

    def close(self, take: Take, loss: Tensor) -> None:
        """Has the next step be decided anew."""
        self._take, self._loss, self.taken = take, loss, None

    def decide(self, norm: float) -> None:
        """Asks whether a step with this norm is to be taken."""
        self.loss, self.norm = float(self._loss), norm
        self.taken = self._take(self.loss, norm)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if self.taken is None:
            self.decide(float(self._zero._global_grad_norm))
        return self._step(*args, **kwargs) if self.taken else None


class _Files(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's files, except that a failure to write is kept until all ranks are through.

    Raised where it happens it would leave the others waiting in DeepSpeed's barriers.
    """

    error: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one file."""
        try:
            super().save(state_dict, path)
        except Exception as caught:
            self.error = caught


def _build_model(config: Config, vocab_size: int, settings: dict[str, Any]) -> PreTrainedModel:
    """The model with the initial weights it has under FSDP2; at stage 3 already in shards."""

    def shard(module: nn.Module) -> None:
        if config.deepspeed.stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)

    return initialised_model(config.model, config.training, vocab_size, shard)
