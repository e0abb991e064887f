"""The pretraining job: `python -m conda_dist.launch.pretrain CONFIG [--key value]`.

Runs as one process or, started by torchrun, mpirun or DeepSpeed's launcher, as many. Exit codes: 0
the run is complete; 1 it failed; 2 the configuration is wrong; 75 it was asked to stop (Ctrl-C,
SIGTERM, SIGUSR1), saved a checkpoint and can be continued with `--resume`. torchrun passes on the
first two signals, the third if `--signals-to-handle` has it, kills what has not ended after 30 s
(`--shutdown-timeout`), and exits with a code of its own. `launch/train.sh` sets both options.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from conda_dist.launch.cluster import launcher
from conda_dist.launch.cluster.signals import end_with_launcher
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.job.files import EXIT_CONFIG
from conda_dist.launch.tools.command_line import check_input, check_output, refuse

_USAGE = """usage: python -m conda_dist.launch.pretrain CONFIG [--section.key value ...]
       torchrun --standalone --nproc-per-node=N -m conda_dist.launch.pretrain CONFIG ...
       mpirun -n N python -m conda_dist.launch.pretrain CONFIG ...
       deepspeed --num_gpus N --module conda_dist.launch.pretrain CONFIG --engine deepspeed ...

Pretrains a causal language model. CONFIG is a TOML file such as configs/llama_tiny.toml.

--output DIR           folder of everything the run writes
--engine NAME          fsdp2, or deepspeed with --deepspeed.stage 0 to 3
--resume [CHECKPOINT]  continue from the newest checkpoint in the output (or from that one)
--check                only say whether the configuration is right
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job and returns the process's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--local_rank="):
        del given[0]  # DeepSpeed's launcher says it here and in LOCAL_RANK
    if {"-h", "--help"} & set(given):
        print(_USAGE + "\n" + options.help_text())
        return 0
    checking = "--check" in given
    given = [word for word in given if word != "--check"]
    try:
        path = given.pop(0) if given and not given[0].startswith("--") else None
        config = options.load(path, given)
        check_output(config.output)
        check_input(config)
    except ConfigError as error:
        # Once on every host: the file may be missing on one alone.
        said = launcher.launched_rank() == 0 or launcher.is_first_of_host()
        return refuse(error) if said else EXIT_CONFIG
    if checking:
        return 0
    end_with_launcher()
    # It imports torch, which takes seconds: what is wrong is said, and a dead launcher is noticed,
    # before that.
    from conda_dist.launch.job import run

    return run.start(config)


if __name__ == "__main__":
    # What torch and transformers make when they are imported stays. To look for garbage among it
    # again and again takes half a second; run.py has Python do so once the engine is built.
    gc.disable()
    launcher.end(main())
