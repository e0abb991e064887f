"""Layer: integrations. Plans Conda for a torchtitan job, in one process without GPUs.

    python -m conda_dist.integrations.torchtitan.plan --ranks 16 [--rank 0] \\
        --module llama3 --config llama3_70b [any torchtitan option]

Builds the model on the meta device, parallelizes it as one rank of many (with torch's fake process
group), and prints the report on each parameter and the decompositions of the busiest rank. It does
not cut a model into pipeline stages: plan one stage with its number of ranks and layers.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from conda_dist.integrations.torchtitan.train import rewrite
from conda_dist.plan.costs import svd_flops
from conda_dist.report import Row, print_table


def refresh_flops(table: Sequence[Row]) -> dict[int, float]:
    """The floating point operations of one refresh, by global rank.

    Only for ranks that share weights with the rank of the report.

    Args:
        table: from :meth:`conda_dist.Conda.report`.
    """
    work: dict[int, float] = defaultdict(float)
    for row in table:
        for owner in row["owners"]:
            work[owner] += svd_flops(*row["shape"][-2:])
    return dict(work)


def plan(arguments: Sequence[str], ranks: int, rank: int) -> list[Row]:
    """The report of one rank of a job, without running the job. Call it once in a process.

    Args:
        arguments: torchtitan's command line.
        ranks: number of ranks of the job.
        rank: the rank to report.

    Raises:
        ValueError: the job has pipeline stages, or Conda does not support it.
    """
    from torchtitan.tools import utils

    if not torch.accelerator.is_available():  # torchtitan would use CUDA
        utils.device_type, utils.device_module = "cpu", torch.cpu
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils

    place = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": 0}
    os.environ.update({key: str(value) for key, value in place.items()})
    config: Any = ConfigManager().parse_args(rewrite(["--optimizer.name", "conda", *arguments]))
    if config.parallelism.pipeline_parallel_degree > 1:
        raise ValueError("pipeline stages are not planned: set pipeline_parallel_degree to 1")
    dist.init_process_group("fake", rank=rank, world_size=ranks)
    try:
        dims = ParallelDims.from_config(config.parallelism, ranks)
        dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
        spec = config.model_spec
        spec.model.update_from_config(config=config)
        with torch.device("meta"):
            model = spec.model.build()
        model = spec.parallelize_fn(
            model,
            parallel_dims=dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=config.compile,
            ac_config=config.activation_checkpoint,
            dump_folder=config.dump_folder,
        )
        (optimizer,) = config.optimizer.build(model_parts=[model]).optimizers
        table: list[Row] = optimizer.report(show=False)
        return table
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the plan."""
    parser = argparse.ArgumentParser(
        prog="python -m conda_dist.integrations.torchtitan.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ranks", type=int, required=True, help="how many ranks the job would have"
    )
    parser.add_argument("--rank", type=int, default=0, help="which of them to show (default 0)")
    parser.add_argument(
        "--svd-tflops",
        type=float,
        default=1.0,
        help="operations a device does in an SVD, 10^12 a second (default 1: an assumption)",
    )
    given, rest = parser.parse_known_args(arguments)
    if not 0 <= given.rank < given.ranks:
        parser.error(f"--rank {given.rank} is none of --ranks {given.ranks}")
    if given.svd_tflops <= 0:
        parser.error(f"--svd-tflops must be above 0, got {given.svd_tflops}")
    if any(word.partition("=")[0] == "--optimizer.name" for word in rest):
        parser.error("--optimizer.name is conda here; leave it out")
    table = plan(rest, given.ranks, given.rank)
    print_table(table)
    work = refresh_flops(table)
    print(
        f"state on rank {given.rank}: {sum(row['state_bytes'] for row in table) / 2**30:.2f} GiB; "
        f"a refresh: {len(work)} ranks decompose {sum(len(row['owners']) for row in table)} "
        f"matrices, the busiest {max(work.values()) / 1e12:.1f} TFLOP, "
        f"{max(work.values()) / 1e12 / given.svd_tflops:.1f} s at {given.svd_tflops:g} TFLOP/s"
    )


if __name__ == "__main__":
    main()
