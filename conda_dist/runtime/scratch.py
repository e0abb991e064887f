"""Memory that the slices of a step reuse, one chunk of them after another."""

import math

import torch
from torch import Tensor


class Scratch:
    """One uninitialized tensor for each dtype and device, which reuses the memory of the last one.

    New memory for each weight would cost 4 % of a step on a CPU (matrices of 3 MiB), because the
    operating system maps it page by page.
    """

    def __init__(self) -> None:
        # The memory, and the view of it that was taken last.
        self._taken: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See :class:`conda_dist.rules.rule.Buffers`."""
        memory, view = self._taken.pop((dtype, device), (None, None))
        if memory is None or view is None or view.shape != shape:
            view, count = None, math.prod(shape)
            if memory is None or memory.numel() < count:
                del memory  # free it before allocating more
                memory = torch.empty(count, dtype=dtype, device=device)
            view = memory[:count].view(shape)
        self._taken[dtype, device] = memory, view
        return view
