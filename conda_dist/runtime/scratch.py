"""Memory that weights reuse, because they step one after another."""

import torch
from torch import Tensor


class Scratch:
    """Uninitialized tensors in numbered slots; a slot reuses the memory of its previous tensor.

    New memory for each weight would cost 4 % of a step on a CPU (matrices of 3 MiB), because the
    operating system maps it page by page.
    """

    def __init__(self) -> None:
        # Of each slot its memory, and the view of it that was taken last.
        self._taken: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`conda_dist.rules.rule.Buffers`."""
        key = slot, dtype, like.device
        memory, view = self._taken.pop(key, (None, None))
        if memory is None or view is None or view.shape != like.shape:
            view, count = None, like.numel()
            if memory is None or memory.numel() < count:
                del memory  # free it before allocating more
                memory = torch.empty(count, dtype=dtype, device=like.device)
            view = memory[:count].view(like.shape)
        self._taken[key] = memory, view
        return view
