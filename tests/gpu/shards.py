"""Sections with ranks: FSDP2 over NCCL on one rank, and over gloo on ranks that share the GPU.

NCCL refuses to share a GPU. gloo takes CUDA tensors and moves them through the host.
"""

import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import training
from common import DEVICE, TOY, Section, end_with_parent, left_s, listed_waits
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conda_dist import Conda, param_groups

SETTINGS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-4, "update_proj_gap": 3}
"""eps: gradients of so small a batch have a low rank."""
WAYS: dict[str, dict[str, Any]] = {
    "svd": {},
    "compute groups": {"basis_budget": 0},
    "iteration": {"refresh_method": "orthogonal_iteration"},
    "eigh64": {"refresh_method": "eigh64"},
    "asynchronous": {"refresh_delay": 2},
}
STEPS = 8
TOLERANCE = 1e-6  # in float64 layouts differ by rounding alone; rotations are in float64, too
ROUNDED = 1e-2
"""For products in bfloat16: a few rounded to the other neighbour move 1e-3, float32 ones 3e-2."""
PATIENCE = timedelta(seconds=30)
"""A collective that takes longer raises, and what comes after it is tried."""


def _llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32 if TOY else 64,
        intermediate_size=88 if TOY else 176,
        num_hidden_layers=1 if TOY else 2,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).double()


def _fsdp(mesh: DeviceMesh, seed: int = 0, **options: Any) -> Any:
    model = _llama(seed)
    model = model if "offload_policy" in options else model.to(DEVICE)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():  # gloo has no average
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(mesh.size()))
            module.set_force_sum_reduction_for_comms(True)
    return model


def _train(model: Any, optimizer: Conda, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(67, (12, 16), generator=generator)
        mine = tokens[rank * 12 // world : (rank + 1) * 12 // world].to(DEVICE)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, param in model.named_parameters():
        whole = param.detach().to(DEVICE)  # of an offloaded parameter the mesh is not the CPU's
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        found[name] = whole.cpu()
    return found


def _apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    start = _whole(_llama())
    return max(
        float((ours[n] - theirs[n]).norm() / ((theirs[n] - start[n]).norm() + 1e-12))
        for n in theirs
    )


def _way(
    mesh: DeviceMesh, options: dict[str, Any], rank: int, world: int, **placed: Any
) -> tuple[str, bool]:
    """How far shards are from one process."""
    model = _fsdp(mesh, **placed)
    _train(model, Conda(param_groups(model), **SETTINGS, **options), range(STEPS), rank, world)
    single = _llama().to(DEVICE)
    _train(single, Conda(param_groups(single), **SETTINGS, **options), range(STEPS))
    apart = _apart(_whole(model), _whole(single))
    return f"{apart:.1e} from one process", apart < TOLERANCE


def _resumed(mesh: DeviceMesh, folder: Path, rank: int, world: int) -> tuple[str, bool]:
    """Saves, goes on; loads into another model, goes on: the same bits."""
    model = _fsdp(mesh)
    optimizer = Conda(param_groups(model), **SETTINGS)
    _train(model, optimizer, range(4), rank, world)
    m, o = get_state_dict(model, optimizer)
    save({"m": m, "o": o}, checkpoint_id=str(folder))
    _train(model, optimizer, range(4, STEPS), rank, world)
    want = _whole(model)
    model = _fsdp(mesh, seed=1)
    optimizer = Conda(param_groups(model), **SETTINGS)
    optimizer.init_state()
    m, o = get_state_dict(model, optimizer)
    load({"m": m, "o": o}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=m, optim_state_dict=o)
    _train(model, optimizer, range(4, STEPS), rank, world)
    got = _whole(model)
    same = all(torch.equal(want[name], got[name]) for name in want)
    return ("the same bits" if same else f"off by {_apart(got, want):.1e}"), same


def _offloaded(mesh: DeviceMesh) -> tuple[str, bool]:
    model = _fsdp(mesh, offload_policy=CPUOffloadPolicy(pin_memory=not TOY))
    optimizer = Conda(param_groups(model), **SETTINGS)
    _train(model, optimizer, range(4))
    states = [v for state in optimizer.state.values() for v in state.values()]
    places = {str(v.to_local().device if hasattr(v, "to_local") else v.device) for v in states}
    return f"state on {', '.join(sorted(places))}", places == {"cpu"}


def _staged(options: dict[str, Any], rank: int, world: int) -> tuple[str, bool]:
    """CPU offload on groups that carry CUDA tensors only, as NCCL's: exchanges go through a GPU."""
    override = {0: f"{DEVICE.type}:gloo"}
    mesh = init_device_mesh(DEVICE.type, (world,), backend_override=override)
    policy = CPUOffloadPolicy(pin_memory=not TOY)
    return _way(mesh, options, rank, world, offload_policy=policy)


def _job(out: Path) -> tuple[str, bool]:
    """Where the host waits in a step of the job: only where it reads loss and norm together."""
    from conda_dist.launch.cluster import process_group
    from conda_dist.launch.job import options
    from conda_dist.launch.job.engine import Fsdp2Engine

    settings = {"optimizer.conda.update_proj_gap": "100", "output": str(out / "work" / "waits")}
    file, *given = training.arguments(out, settings)
    config = options.load(file, given)
    engine = Fsdp2Engine(config, 300, process_group.join(60))
    length, rows = config.training.sequence_length, config.training.micro_batch_size
    generator = np.random.default_rng(0)
    for step in range(6):
        micro_batches = [generator.integers(300, size=(rows, length + 1)) for _ in range(2)]
        with listed_waits() as places:
            engine.forward_backward(micro_batches, 2 * rows * length)
            engine.step(lambda loss, norm: True)
        if step < 4:  # the first steps allocate, and take the bases
            continue
        if len(places) != (0 if TOY else 1):
            return f"step {step}: {', '.join(places) or 'no wait'}", False
    return "one wait a step", True


def _bfloat16(mesh: DeviceMesh) -> tuple[str, bool]:
    """Products in bfloat16 of rows where they are, and of whole matrices after an exchange."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(96, 32, generator=generator).to(DEVICE) for _ in range(STEPS))
    ends = []
    for budget in (None, 0):
        param = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        group = {"params": [param], "algorithm": "conda"}
        options = {**SETTINGS, "matmul_dtype": torch.bfloat16, "basis_budget": budget}
        optimizer = Conda([group], **options)
        for grad in grads:
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
            optimizer.step()
        ends.append(param.detach().full_tensor() - start)
    apart = float((ends[0] - ends[1]).norm() / ends[1].norm())
    return f"{apart:.1e} from exchanged", apart < ROUNDED


def _uneven(rank: int, world: int) -> tuple[str, bool]:
    """Exchanges in which some ranks send or receive nothing."""
    given = torch.arange(3.0, device=DEVICE)
    taken = torch.empty(3 * world if not rank else 0, device=DEVICE)
    dist.all_to_all_single(
        taken, given, [3] * world if not rank else [0] * world, [3] + [0] * (world - 1)
    )
    right = bool((taken.cpu() == torch.arange(3.0).repeat(taken.numel() // 3)).all())
    return "arrived" if right else f"got {taken.tolist()}", right


def _rank(rank: int, world: int, backend: str, port: int, out: Path, answers: Any) -> None:
    """Puts (what, what came of it, whether it is right) for each, at once; at last None."""
    end_with_parent()

    def answer(what: str, said: str, right: bool) -> None:
        if rank == 0 or not right:  # what is wrong on another rank, too
            answers.put((what if rank == 0 else f"{what}, rank {rank}", said, right))

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    try:
        if not TOY:
            torch.cuda.set_device(0)
        dist.init_process_group(backend, timeout=PATIENCE)
        mesh = init_device_mesh(DEVICE.type, (world,))
        tried: dict[str, Any] = {
            what: (_way, mesh, options, rank, world) for what, options in WAYS.items()
        }
        if TOY:
            tried = {what: tried[what] for what in ("svd", "compute groups")}
        tried["DCP"] = _resumed, mesh, out / "work" / f"dcp-{world}", rank, world
        if world == 1:
            tried["CPU offload"] = _offloaded, mesh
            tried["a step of the job"] = _job, out
        else:
            tried["bfloat16 products in place"] = _bfloat16, mesh
            tried["CPU offload, staged"] = _staged, {}, rank, world
            tried["CPU offload, staged, groups"] = _staged, WAYS["compute groups"], rank, world
        tried["uneven and empty splits"] = _uneven, rank, world
        for what, (function, *args) in tried.items():
            try:
                answer(what, *function(*args))
            except Exception:
                answer(what, traceback.format_exc()[-900:], False)
            dist.barrier()
        dist.destroy_process_group()
    except Exception:
        answer("the ranks", traceback.format_exc()[-900:], False)
    answers.put(None)


def _spawn(section: Section, out: Path, world: int, backend: str, limit_s: float) -> None:
    # A process that has used CUDA cannot be forked; in a rehearsal forking saves the imports.
    context = mp.get_context("fork" if TOY else "spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, world, backend, port, out, answers))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + min(limit_s, left_s())
    try:
        done = 0  # ranks; an answer may come after the last of another rank
        while done < world:
            answer = answers.get(timeout=max(0.1, end - time.monotonic()))
            if answer is None:
                done += 1
                continue
            what, said, right = answer
            section.add(f"{world} {backend}: {what}", said, "", right)
    except queue.Empty:
        section.add(f"{world} {backend}: the ranks", f"no answer in {limit_s:.0f} s", "", False)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()


def one_rank(section: Section, out: Path) -> None:
    """FSDP2 on one rank over NCCL: ways to refresh, a checkpoint, CPU offload, the job."""
    _spawn(section, out, 1, "gloo" if TOY else "nccl", 85)


def many_ranks(section: Section, out: Path) -> None:
    """FSDP2 on ranks that share the GPU, over gloo."""
    for world in (2,) if TOY else (2, 3):
        _spawn(section, out, world, "gloo", 52)
