"""What Conda would cost a model on any mesh and hardware, without running anything.

    python -m conda_dist.launch.plan --model configs/llama_7b.toml --mesh dp_shard=64 \\
        [--tp 8] [--hardware h100-ib400] [--optimizer.conda.update_proj_gap 200]
    python -m conda_dist.launch.plan --scaling plan.png

The first prints what each weight gets and what a step and a refresh cost beside AdamW, Muon and a
Conda that every rank has whole; keys of Conda are given as to the pretraining job. The second
draws the cost against the number of ranks for LLaMA 7B, 70B and 405B. Bytes are those of the
optimizer's own plans, which tests hold to counted runs; seconds are arithmetic with the rates that
`tools/hardware.py` states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.tools.command_line import Parser, check_file, positive, refuse
from conda_dist.launch.tools.hardware import AXES, HARDWARE, Mesh

MOST_RANKS = 2**16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan, or draws the picture; returns the exit code."""
    given, keys = _parser().parse_known_args(arguments)
    hardware = HARDWARE[given.hardware]
    try:
        if given.scaling:
            if given.model is not None or given.mesh or given.tp is not None:
                raise ConfigError("--scaling draws its own models and meshes: leave the others out")
            check_file("--scaling", given.scaling)
            options.load(None, keys)
        elif given.model is None or not given.mesh:
            raise ConfigError("name a --model and a --mesh, such as dp_shard=64 (or --scaling)")
        else:
            mesh, config = read_mesh(given.mesh, given.tp), options.load(str(given.model), keys)
        # It imports torch, which takes seconds.
        from conda_dist.launch.tools import planned

        if given.scaling:
            planned.draw_scaling(given.scaling, hardware, given.tokens_per_rank, keys)
            print(f"drawn in {given.scaling}")
        else:
            found = planned.Planned(config, mesh, given.tokens_per_rank)
            found.show(hardware, given.hardware)
    except ConfigError as error:
        return refuse(error)
    return 0


def _parser() -> Parser:
    parser = Parser("plan", __doc__)
    parser.add_argument("--model", type=Path, help="a TOML file of the pretraining job")
    parser.add_argument(
        "--mesh", nargs="+", default=[], metavar="AXIS=N", help=f"ranks along {', '.join(AXES)}"
    )
    parser.add_argument("--tp", type=int, help="the same as tp=N in --mesh")
    parser.add_argument("--hardware", choices=HARDWARE, default="h100-ib400")
    parser.add_argument(
        "--tokens-per-rank",
        type=positive,
        default=8192,
        help="tokens of a step on each data-parallel rank (default 8192)",
    )
    parser.add_argument("--scaling", type=Path, metavar="PNG", help="draw cost against ranks")
    return parser


def read_mesh(axes: Sequence[str], tp: int | None = None) -> Mesh:
    """The mesh of words such as "dp_shard=64".

    Raises:
        ConfigError: An axis is unknown or named twice, its number is not a positive one, or there
            would be more ranks than a plan can look at.
    """
    sizes: dict[str, int] = {} if tp is None else {"tp": tp}
    for word in axes:
        name, _, number = word.partition("=")
        if name not in AXES:
            raise ConfigError(f"--mesh has no axis {name!r}; it has {', '.join(AXES)}")
        if name in sizes:
            raise ConfigError(f"{name} is given twice")
        sizes[name] = int(number) if number.isdecimal() and len(number) < 10 else 0
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be a positive number of ranks, as in {name}=8")
    mesh = Mesh(**sizes)
    if mesh.ranks > MOST_RANKS:
        raise ConfigError(f"{mesh.ranks} ranks are more than the {MOST_RANKS} that can be planned")
    return mesh


if __name__ == "__main__":
    raise SystemExit(main())
