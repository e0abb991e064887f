"""Numbers that are not finite, traced to ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conda_dist.launch.cluster.process_group import World, gather
from conda_dist.runtime.dtensor import local

_NAMED = 3
"""Weights that a message names; of the others it gives the number."""


class Origin:
    """Which ranks a number that is not finite came from, which sums over ranks do not tell.

    A rank looks at its own loss, and at the gradient of its embeddings' output: the last one of
    the backward pass, which whatever is not finite in the blocks above reaches through their
    residual connections. Looking waits for no device.
    """

    def __init__(self, embeddings: nn.Module, device: torch.device) -> None:
        """Looks on from here."""
        # No World: the model would keep its groups to the interpreter's end, which then aborts.
        self._sound = torch.ones(2, dtype=torch.bool, device=device)
        embeddings.register_forward_hook(self._watch)

    def begin(self) -> None:
        """Forgets the step before."""
        self._sound.fill_(True)

    def loss(self, own: Tensor) -> None:
        """Looks at this rank's own part of the loss."""
        self._sound[0] &= own.isfinite()

    def _watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._look)  # type: ignore[no-untyped-call]

    def _look(self, gradient: Tensor) -> None:
        self._sound[1] &= gradient.isfinite().all()

    def describe(self, world: World, model: nn.Module) -> str:
        """Whose loss or gradient it was, or of which weights, in words; every rank asks.

        Args:
            world: All ranks.
            model: With the gradients still there. After their reduction a number that is not finite
                is on the rank that keeps it, wherever it came from: that rank is not named.
        """
        everyone = gather(world, self._sound.tolist())
        for index, what in enumerate(("loss", "gradient")):
            ranks = [rank for rank, sound in enumerate(everyone) if not sound[index]]
            if ranks:
                listed = ", ".join(map(str, ranks))
                return f"the {what} of rank {listed} is not finite"
        sound = "each rank's own loss and activations' gradients are finite"
        own = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not local(parameter.grad).isfinite().all()
        ]
        bad = {name for names in gather(world, own) for name in names}
        names = [name for name, _ in model.named_parameters() if name in bad]
        if not names:
            return sound
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{sound}, not the gradient of {', '.join(names[:_NAMED])}{more}"
