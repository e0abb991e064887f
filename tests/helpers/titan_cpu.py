"""torchtitan's own Trainer on CPU processes: what it needs stand-ins for, and what a run logged.

As a function, on the processes of ``ranks``:

    logs = ranks.run(2, titan_cpu.job, "launcher", folder, ["--module", "llama3", ...])

As a script, on torchrun's, in --folder; the last rank writes what it logged to --record:

    torchrun --standalone --nproc-per-node 2 tests/helpers/titan_cpu.py --route launcher \\
        --record losses.json --module llama3 --config llama3_debugmodel --optimizer.name conda
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import logging
import os
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

ROUTES = ("launcher", "torchtitan")
"""conda_dist's launcher, or torchtitan's own program."""

ALWAYS = (
    "--training.disable_cuda_graphs",
    "--optimizer.implementation=for-loop",
    "--training.mixed_precision_param=float32",
    "--metrics.log_freq=1",
    "--debug.no-enable-structured-logging",
)
"""What a CPU needs, and products in float32, so that layouts differ by rounding only."""


class Step(NamedTuple):
    """What torchtitan logged of one step."""

    step: int
    loss: float
    grad_norm: float
    lrs: list[float]
    """Learning rates of the parameter groups."""


def stand_in_device() -> None:
    """Makes torchtitan take CPUs for its devices; before the modules that read it are imported."""
    from torchtitan.tools import utils

    if utils.device_type == "cpu":
        return
    assert "torchtitan.trainer" not in sys.modules, "torchtitan was imported with another device"
    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        get_device_name=lambda device=None: "cpu",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=2**30),
        memory_stats=lambda device=None: {},
        reset_peak_memory_stats=lambda device=None: None,
    )


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    **_: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention with the block mask made dense: flex attention has no backward on CPU."""
    length, memory = q.shape[-2], k.shape[-2]
    batch, heads = block_mask.shape[:2]
    index = (
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(heads).view(-1, 1, 1),
        torch.arange(length).view(-1, 1),
        torch.arange(memory),
    )
    dense = block_mask.mask_mod(*index).expand(batch, heads, length, memory)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=dense, scale=scale, enable_gqa=enable_gqa)
    return out, SimpleNamespace(lse=None)


def _all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any = None) -> None:
    """``dist.all_to_all`` of lists, which gloo has not, by the single-tensor one, which it has."""
    received = torch.cat([out.flatten() for out in outputs])
    sent = torch.cat([chunk.flatten() for chunk in inputs])
    sizes = [out.numel() for out in outputs]
    dist.all_to_all_single(received, sent, sizes, [c.numel() for c in inputs], group=group)
    for out, part in zip(outputs, torch.split(received, sizes), strict=True):
        out.copy_(part.view_as(out))


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """What the Trainer cannot do on CPU, done otherwise while this lasts."""
    stand_in_device()
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.nn.attention.flex_attention import create_block_mask
    from torchtitan import trainer
    from torchtitan.distributed import fsdp
    from torchtitan.models.common import attention

    divide = FSDPModule.set_gradient_divide_factor

    def divide_and_sum(module: FSDPModule, factor: float) -> None:
        """gloo has sums only: no reduction that scales as well."""
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    no_sleep = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (attention.FlexAttention, "compiled_flex_attn", staticmethod(_attention)),
            (attention, "_compiled_create_block_mask", create_block_mask),
            (FSDPModule, "set_gradient_divide_factor", divide_and_sum),
            (fsdp, "CPUOffloadPolicy", functools.partial(CPUOffloadPolicy, pin_memory=False)),
            (dist, "all_to_all", _all_to_all),
            (trainer, "time", no_sleep),  # it waits two seconds for nothing at the end
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


class Run(NamedTuple):
    """What one rank's run logged."""

    steps: list[Step]
    messages: list[str]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextlib.contextmanager
def recorded() -> Iterator[Run]:
    """Collects what torchtitan logs; the losses unrounded."""
    import torchtitan.train
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.tools.logging import logger

    run = Run([], [])
    log = MetricsProcessor.log

    def record(
        self: Any, step: int, loss: float, max_loss: float, grad_norm: float, **extra: Any
    ) -> None:
        lrs = [value for key, value in extra["extra_metrics"].items() if key.startswith("lr/")]
        run.steps.append(Step(step, loss, grad_norm, lrs))
        log(self, step, loss, max_loss, grad_norm, **extra)

    handler = _Collector(run.messages)
    kept, level = logger.handlers[:], logger.level
    logger.handlers[:] = [handler]
    try:
        # Its init_logger would put its own handler in this one's place.
        quiet = mock.patch.object(torchtitan.train, "init_logger")
        with mock.patch.object(MetricsProcessor, "log", record), quiet:
            logger.setLevel(logging.INFO)
            yield run
    finally:
        logger.handlers[:] = kept
        logger.setLevel(level)


def train(route: str, arguments: Sequence[str]) -> Run:
    """Runs a job in this process, one of ``WORLD_SIZE``, in the working directory."""
    argv = ["train", *ALWAYS, *arguments]  # of an option given twice, the last counts
    with stand_ins(), recorded() as run, mock.patch.object(sys, "argv", argv):
        # torchtitan does this where it makes the process group itself: its recomputation finds
        # its meshes in thread-local state.
        threads = torch.autograd.is_multithreading_enabled()
        torch.autograd.set_multithreading_enabled(False)
        try:
            if route == "launcher":  # as python -m does it
                runpy.run_module("conda_dist.integrations.torchtitan.train", run_name="__main__")
            else:
                import torchtitan.train

                torchtitan.train.main()
        finally:
            torch.autograd.set_multithreading_enabled(threads)
            gc.enable()  # torchtitan collects garbage itself
            # They hold this job's meshes, which the next job's would be equal to but not.
            _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    return run


def job(route: str, folder: Path, arguments: Sequence[str]) -> Run:
    """Runs a job on the process group that is there, with ``folder`` as working directory."""
    rank = str(dist.get_rank())
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    with mock.patch.dict(os.environ, env), contextlib.chdir(folder):
        return train(route, arguments)


def refusal(route: str, folder: Path, arguments: Sequence[str]) -> str:
    """What a job that must fail says: the exception, or what it printed before it exited."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            job(route, folder, arguments)
    except SystemExit:
        return said.getvalue()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the job was not refused")


def main() -> None:
    """Runs a job as one of torchrun's processes."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--route", choices=ROUTES, default="launcher")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--folder", type=Path, default=".")
    options, arguments = parser.parse_known_args()
    torch.set_num_threads(1)
    with contextlib.chdir(options.folder):
        run = train(options.route, arguments)
    if options.record and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        options.record.write_text(json.dumps([step._asdict() for step in run.steps]))


if __name__ == "__main__":
    main()
