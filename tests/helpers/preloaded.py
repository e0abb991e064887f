"""Processes that are forked from one that has imported what takes seconds.

``process`` makes one. It has no threads, and nothing of this process.
"""

import multiprocessing as mp
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

context = mp.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.tensor.parallel",
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "conda_dist.launch.job.run",
        "frameworks",
    ]
)


def process(target: Callable[..., Any], *args: Any, daemon: bool = False) -> ForkServerProcess:
    """A process that will call a function."""
    # The server, which starts with the first process, is not told of this process's sys.path.
    folders = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, folders))):
        forkserver.ensure_running()
    return context.Process(target=target, args=args, daemon=daemon)
