"""Layer: integrations. torchtitan's training job, which then knows ``--optimizer.name conda``.

    torchrun --nproc-per-node=8 -m conda_dist.integrations.torchtitan.train \\
        --module llama3 --config llama3_8b --optimizer.name conda --optimizer.lr 0.01

All options are torchtitan's, and Conda's under ``--optimizer``. Without ``--optimizer.name`` the
command line is handed on as it is.
"""

import importlib
import sys
from collections.abc import Sequence

REGISTRY = "conda_dist.integrations.torchtitan"


def rewrite(arguments: Sequence[str]) -> list[str]:
    """The command line for torchtitan: ``--module M --config C`` becomes ours for ``M.C``.

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
        return list(arguments)  # an incomplete one is torchtitan's to refuse
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
        # torchtitan would take an error in here for a config that does not exist.
        importlib.import_module(f"{REGISTRY}.config_registry")
    train()


if __name__ == "__main__":
    main()
