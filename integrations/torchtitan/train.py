"""Layer: integrations. torchtitan's training job with ``--optimizer.name conda``.

    torchrun --nproc-per-node=8 -m conda_dist.integrations.torchtitan.train \\
        --module llama3 --config llama3_8b --optimizer.name conda --optimizer.lr 0.01

All options are torchtitan's; Conda's options are under ``--optimizer``. Without
``--optimizer.name``, torchtitan gets the command line unchanged.
"""

import importlib
import sys
from collections.abc import Sequence

REGISTRY = "conda_dist.integrations.torchtitan"


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Rewrites ``--module M --config C`` so that torchtitan takes config ``M.C`` from this package.

    Args:
        arguments: a command line without the program's name.
    """
    given = {"--module": "", "--config": ""}
    rest = list[str]()
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.partition("=")
        if key in given:
            given[key] = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    named = any(argument.partition("=")[0] == "--optimizer.name" for argument in rest)
    if not named or given["--module"] == REGISTRY or not all(given.values()):
        return list(arguments)  # torchtitan says what an incomplete command line lacks
    config = f"{given['--module']}.{given['--config']}"
    return ["--module", REGISTRY, "--config", config, *rest]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs torchtitan's training job.

    Args:
        argv: a command line without the program's name; by default this program's.
    """
    try:
        from torchtitan.train import main as train
    except ModuleNotFoundError as error:
        if error.name != "torchtitan":
            raise
        raise SystemExit(
            "torchtitan is not installed: pip install 'conda_dist[torchtitan]'"
        ) from error
    sys.argv[1:] = rewrite(sys.argv[1:] if argv is None else argv)
    if REGISTRY in sys.argv:
        # Import it here: torchtitan would report an error in it as a config that does not exist.
        importlib.import_module(f"{REGISTRY}.config_registry")
    train()


if __name__ == "__main__":
    main()
