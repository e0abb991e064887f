"""Rates of the hardware that the planner reckons with.

Peaks and links are the vendors' figures; what part of them a program reaches, and how fast a
singular value decomposition runs, are assumptions. Nothing here was measured, but the host's times:
by ``time.thread_time`` on a CPU core, with weights so small that only Python and torch's dispatch
count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOST_STEP, HOST_UPDATE, HOST_BF16, HOST_EXCHANGE = 250e-6, 40e-6, 15e-6, 15e-6
"""Seconds of the host: for a step; for the update of one weight; in addition, if its products are
in bfloat16; and for packing one weight's gradient or update, and again for unpacking it. They do
not grow with the ranks. The update is that of a weight beside others of its shape, with which it
shares the kernels of the moments; one by itself takes 35e-6 more, which is not counted."""
UPDATE_LAUNCHES, BF16_LAUNCHES, EXCHANGE_LAUNCHES = 2, 3, 1
"""Kernels of a device: two products for an update; in bfloat16 two casts, and one that applies the
update; one copy for packing. The kernels that weights of one shape share are not counted."""

AXES = ("dp_replicate", "dp_shard", "tp")
"""Mesh dimensions, the outermost first, as DeviceMesh orders them."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device of a cluster and its share of the network.

    Attributes:
        bf16_flops: Dense bfloat16 operations a second, peak.
        fp32_flops: The same in float32, as torch multiplies it by default.
        memory: Bytes a second between device and its memory, peak.
        capacity: Bytes of its memory.
        near: Bytes a second a device sends to others of its host.
        far: Bytes a second a device sends to other hosts.
        per_host: Devices of a host.
        latency: Seconds a collective takes before anything has moved.
        svd_flops: Operations a second in a decomposition (assumed).
        reached: Part of the peaks that products, kernels and links reach (assumed).
        training: Part of the bfloat16 peak that forward and backward passes reach (assumed).
    """

    bf16_flops: float
    fp32_flops: float
    memory: float
    capacity: float
    near: float
    far: float
    per_host: int
    latency: float = 30e-6
    svd_flops: float = 1e12
    reached: float = 0.7
    training: float = 0.4


HARDWARE = {
    "h100-ib400": Hardware(989e12, 67e12, 3.35e12, 80e9, 450e9, 50e9, 8),
    "a100-ib200": Hardware(312e12, 19.5e12, 2.04e12, 80e9, 300e9, 25e9, 8),
    "b200-ib400": Hardware(2250e12, 75e12, 7.7e12, 180e9, 900e9, 50e9, 8),
}
"""NVIDIA's data sheets: H100 SXM with ConnectX-7, A100 80 GB SXM with ConnectX-6, B200."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks along each of ``AXES``."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks along each axis."""
        return (self.dp_replicate, self.dp_shard, self.tp)

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.sizes)

    def is_near(self, axis: int, hardware: Hardware) -> bool:
        """Whether ranks that differ along an axis only are on one host."""
        return math.prod(self.sizes[axis:]) <= hardware.per_host
