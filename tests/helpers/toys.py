"""Small parameters with given gradients, and a small model, for tests in one process."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

SHAPES = ((6, 4), (3, 5), (4,))
"""A tall and a wide weight for the conda path, a bias for the adamw path."""

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "update_proj_gap": 3,
}
"""Several refreshes in a few steps, and every term of the update."""

Gradients = Sequence[Sequence[Tensor | None]]
"""For each step the gradient of each parameter."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A normal tensor, the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random orthogonal matrices."""
    return torch.linalg.qr(random(*shape, seed=seed, dtype=torch.float64)).Q.to(dtype)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A parameter of each shape, of ``SHAPES`` if none is given."""
    return [
        nn.Parameter(random(*shape, seed=100 + i, dtype=dtype))
        for i, shape in enumerate(shapes or SHAPES)
    ]


def copies(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters of the same values."""
    return [nn.Parameter(param.detach().clone()) for param in params]


def gradients(params: Sequence[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """A normal gradient for each step and parameter."""
    return [
        [
            random(*p.shape, seed=1000 * seed + 50 * t + i, dtype=p.dtype)
            for i, p in enumerate(params)
        ]
        for t in range(steps)
    ]


def take(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Gradients
) -> list[list[Tensor]]:
    """Takes a step for each row of gradients; returns the parameters after each."""
    after = []
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        after.append([param.detach().clone() for param in params])
    return after


def same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def error(ours: Tensor, theirs: Tensor, start: Tensor) -> float:
    """Distance between two outcomes, relative to the distance travelled; 0 if both stayed."""
    ours, theirs, start = (x.detach().double() for x in (ours, theirs, start))
    apart = (ours - theirs).norm()
    return (apart / (theirs - start).norm()).item() if apart else 0.0


class Block(nn.Module):
    """An MLP with an embedding and a head, as small as they get."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.lm_head(self.norm(hidden + self.down(self.up(hidden).relu())))


def loss(model: nn.Module, step: int) -> Tensor:
    """The loss of a batch that the step decides."""
    tokens = torch.randint(10, (16,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 10)


def chosen(groups: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Algorithm by parameter name."""
    return {
        name: group["algorithm"]
        for group in groups
        for name in group.get("param_names", [n for n, *_ in group["params"]])
    }


def paths(optimizer: Any) -> dict[str, str]:
    """Path by parameter name, or by what stands for one, of all that are trainable."""
    return {row["name"]: row["path"] for row in optimizer.report(show=False)}


def peak(function: Callable[[], object]) -> int:
    """Most bytes allocated at once above the start, of tensors on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    held = most = 0
    events = trace.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
