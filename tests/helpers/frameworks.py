"""Imports the frameworks that ranks of tests use, with a CPU for their device.

``preloaded`` has its server import this once; else each of some forty processes spends seconds on
it. What is not installed, as on the oldest torch, is left out.
"""

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

with contextlib.suppress(ImportError):
    import titan_cpu

    titan_cpu.stand_in_device()
    import torchtitan.train  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401

with contextlib.suppress(ImportError):
    import transformers.trainer  # noqa: F401
