"""Time of an optimizer's step and bytes of its state, on LLaMA-shaped matrices.

    python -m conda_dist.launch.benchmark [--width 512] [--mlp 1376] [--layers 4] [--rounds 40]
    python -m conda_dist.launch.benchmark --gap 5 [--refresh-method orthogonal_iteration]
    python -m conda_dist.launch.benchmark --only conda_dist "conda_dist, diagnostics"
    python -m conda_dist.launch.benchmark --picture FILE --json FILE ...
    python -m conda_dist.launch.benchmark --device cuda --model configs/llama_7b.toml --layers 2

One process, one thread or one GPU. `--model` takes width and MLP of a config. Medians and quartiles
of the rounds are printed, and the medians of their ratios to the first. On a CPU all run in turns,
so that whatever slows the machine down slows all. On a GPU they run one after another; times are
the device's, beside the host's for a weight and the memory that a step takes at its peak.

Steps are those between refreshes, with random bases; or with `--gap` the mean of so many, one of
which refreshes the bases (SOAP's and the other Conda's, too), beside the time that it adds. "two
products" is Conda's floor: the projection and the way back alone; "Newton-Schulz products" is that
of Muon, NorMuon, NAMO and NAMO-D. "diagnostics" collects them in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.tools.command_line import PICTURES, Parser, check_file, positive, refuse
from conda_dist.options import REFRESH_METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its table; returns the exit code."""
    parser = Parser("benchmark", __doc__)
    for option, default in (("width", 512), ("mlp", 1376), ("layers", 4), ("rounds", 40)):
        parser.add_argument(f"--{option}", type=positive, default=default)
    parser.add_argument("--model", type=Path, help="a TOML file of the pretraining job")
    parser.add_argument("--gap", type=positive, help="steps between refreshes (default: none)")
    parser.add_argument("--refresh-method", choices=REFRESH_METHODS, default=REFRESH_METHODS[1])
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="of the table's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--picture", metavar="FILE", type=Path, help="draw the times, in the file's format"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers there")
    given = parser.parse_args(arguments)
    try:
        for option, path, formats in (
            ("--picture", given.picture, PICTURES),
            ("--json", given.json, ("json",)),
        ):
            if path:
                check_file(option, path, formats)
        if given.model:
            model = options.load(given.model).model
            given.width, given.mlp = model.hidden_size, model.intermediate_size
        # It imports torch, which takes seconds.
        import torch

        from conda_dist.launch.tools import benchmark_process

        if given.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU here")
        benchmark_process.run(given)
    except ConfigError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
