"""A small model with every kind of weight, on every layout, with gradients known in advance.

Gradients depend on a parameter's name and the step alone, so that runs on different layouts can
be held against each other, and a resumed run against the one that never stopped.
"""

import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from conda_dist import Conda, param_groups

GAP = 3
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "update_proj_gap": GAP}
WIDTH, HIDDEN, EXPERTS, VOCABULARY = 10, 22, 3, 17
"""No rank count from 2 to 4 divides all of them; on 4 ranks one holds no expert."""

Layout = tuple[str, tuple[int, ...]]
"""A kind of :func:`build`, and the shape of the device mesh."""
PLAIN: Layout = ("plain", ())
FSDP2: Layout = ("fsdp", (2,))


class Block(nn.Module):
    """Square, tall, wide and 3-D weights, a bias and a norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=True)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, width, 6) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(self.norm(x))
        x = x + self.down(torch.relu(self.up(x)))
        return x + torch.einsum("bse,xef,xgf->bsg", x, self.experts, self.experts) / EXPERTS


class Tiny(nn.Module):
    """Two blocks between an embedding and an output head."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def shard(model: nn.Module, layout: Layout) -> nn.Module:
    """Puts a model on a layout.

    "plain", "ddp" (plain, the optimizer knows the others), "fsdp", "hsdp" or "grid", which is
    [Shard(0), Shard(1)].
    """
    kind, shape = layout
    if kind in ("plain", "ddp"):
        return model
    names = {1: ("shard",), 2: ("replicate", "shard")}[len(shape)]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if kind == "grid":
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                places = [Shard(0), Shard(1) if param.ndim > 1 else Replicate()]
                sharded = distribute_tensor(param.detach(), mesh, places, src_data_rank=None)
                setattr(module, name, nn.Parameter(sharded))
        return model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def build(
    layout: Layout,
    *,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    optimizer: type[torch.optim.Optimizer] = Conda,
    **options: Any,
) -> tuple[Any, Any]:
    """A model on a layout, the same on all, and its optimizer."""
    torch.manual_seed(seed)
    model = shard(Tiny(width, hidden).to(dtype), layout)
    if layout[0] == "ddp":
        options["process_group"] = dist.group.WORLD
    if optimizer is Conda:
        return model, Conda(param_groups(model), **{**SETTINGS, **options})
    return model, optimizer(model.parameters(), lr=1e-2, **options)


def like(param: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as a parameter of that layout has it, without a word to other ranks."""
    if not isinstance(param, DTensor):
        return whole
    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def gradient(name: str, param: Tensor, step: int) -> Tensor:
    """The gradient of a parameter at a step."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return like(param, torch.randn(param.shape, generator=generator).to(param.dtype))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], *zero: str
) -> None:
    """Takes steps; parameters whose names end with one of ``zero`` have zero gradients."""
    for step in steps:
        for name, param in model.named_parameters():
            if param.requires_grad:
                grad = gradient(name, param, step)
                param.grad = torch.zeros_like(grad) if name.endswith(zero) else grad
        optimizer.step()
        optimizer.zero_grad()


def local(value: Tensor) -> Tensor:
    """A copy of what this rank holds."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def whole(value: Tensor) -> Tensor:
    """A copy of the whole; a collective."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, view: Any = local) -> Any:
    """Every parameter and every state by name, as ``view`` shows them."""
    taken = {}
    order = [param for group in optimizer.param_groups for param in group["params"]]
    states = {
        order[i]: {k: v for k, v in state.items() if isinstance(v, Tensor)}
        for i, state in optimizer.state_dict()["state"].items()
        if isinstance(i, int)  # what wrappers keep beside has other keys
    }
    for name, param in model.named_parameters():
        taken[name] = view(param)
        for key, value in states.get(param, {}).items():
            taken[f"{name}:{key}"] = view(value)
    return taken


def unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in shape, dtype and every bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].shape != theirs[name].shape
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(bits(ours[name]), bits(theirs[name]))
    ]


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The worst distance between two runs' parameters, relative to the distance travelled."""
    names = [name for name in theirs if ":" not in name]
    return max(
        ((ours[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()).item()
        for name in names
    )


def save(folder: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves both with torch's distributed checkpoints, as its tutorials do."""
    parts = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optim"), parts, strict=True)), checkpoint_id=str(folder))


def load(folder: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads what :func:`save` wrote, onto whatever layout the model is on."""
    parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=str(folder))
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optim"]
    )


def attempt(action: Any, *args: Any) -> str:
    """What an action that must fail says, with what caused it."""
    try:
        action(*args)
    except (Exception, CheckpointException) as error:  # torch's derives from BaseException
        said: dict[str, None] = {}  # an error may be the cause of its own context
        while error is not None and (text := f"{type(error).__name__}: {error}") not in said:
            said[text] = None
            error = error.__cause__ or error.__context__
        return "\n".join(said)
    return "nothing was raised"


def place(whole: Tensor, mesh: DeviceMesh, places: list[Placement]) -> Tensor:
    """A tensor that all ranks have, laid out over a mesh; without a message."""
    example = DTensor.from_local(torch.zeros(1), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return like(example, whole).redistribute(mesh, places)


def warned_step(model: Any, optimizer: Any, step: int) -> list[str]:
    """Takes a step; what it warned of bases."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, [step])
    return [str(w.message) for w in caught if "basis" in str(w.message)]
