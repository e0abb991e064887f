"""Processes that are forked from one that has imported what takes seconds.

``context.Process`` starts one. It has no threads, and nothing of this process.
"""

import multiprocessing as mp

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
    ]
)
