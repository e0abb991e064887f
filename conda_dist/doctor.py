"""Prints what a bug report needs: ``python -m conda_dist.doctor``.

It lists versions, devices and backends, and says what is wrong: a package that is too old or cannot
be imported, a GPU that torch cannot use, a backend that does not work. The exit code is 1 if
something is wrong. What may end a process is tried in a process of its own.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

_OURSELVES = "conda-dist"
_TRAINERS = ("accelerate", "lightning", "trl", "peft")
_IMPORTS = {
    "deepspeed": "conda_dist.integrations.deepspeed",
    "mpi4py": "mpi4py.MPI",
    "tensorboard": "torch.utils.tensorboard",
    "torchtitan": "conda_dist.integrations.torchtitan.container",
    "transformers": "conda_dist.integrations.huggingface",
}
"""What of a package conda_dist imports; if nothing is said here, the package itself."""
_PREFIXES = ("CUDA_", "DS_", "GLOO_", "HSA_", "HIP_", "NCCL_", "OMP_", "ROCR_", "TORCH_")
_PATIENCE_S = 180.0
_ATTEMPT = """
try:
    exec({code!r})
except BaseException as error:
    import sys
    sys.exit(" ".join(f"{{type(error).__name__}}: {{error}}".split())[:500])
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    found: str
    wrong: str = ""
    """What is wrong, and what to do; empty if nothing is."""
    installed: bool = True


def main() -> int:
    """Prints the report, and returns the exit code: 1 if something is wrong."""
    wrong = list[Finding]()
    for section in (versions, packages, devices, backends, compiler, training, environment):
        for finding in _guarded(section):
            print(f"{finding.name:<14} {finding.found}", flush=True)
            wrong += [finding] if finding.wrong else []
        if section is packages and ("torch" in {f.name for f in wrong} or not _version("torch")):
            break  # the other sections import it
    print("", *(f"WRONG: {finding.name}: {finding.wrong}" for finding in wrong), sep="\n")
    print(f"{len(wrong)} wrong" if wrong else "Nothing is wrong.")
    return 1 if wrong else 0


def _guarded(section: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a section, of which an error is the last."""
    try:
        yield from section()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        yield Finding(section.__name__, "not found out", said)


def versions() -> Iterator[Finding]:
    """This package, Python and the system."""
    yield Finding("Python", f"{platform.python_version()}, {platform.platform()}")
    here = Path(__file__).parent
    lost = "it is not installed, so its integrations and commands are not found: pip install"
    version = _version(_OURSELVES)
    wrong = "" if version else f"{lost} {here.parent}"
    yield Finding(_OURSELVES, f"{version or 'not installed'}, in {here}", wrong)


def packages() -> Iterator[Finding]:
    """Packages that conda_dist needs or can be used with."""
    from packaging.requirements import Requirement

    asked = dict.fromkeys(_TRAINERS, "")
    for line in metadata.requires(_OURSELVES) or ():
        need = Requirement(line)
        ours = need.marker and any(need.marker.evaluate({"extra": e}) for e in ("dev", "test"))
        # What the package itself needs comes first, and counts.
        if not ours and need.name != _OURSELVES and not asked.get(need.name):
            asked[need.name] = line
    found = [package(name, asked[name]) for name in sorted(asked)]
    sound = [_module(one.name) for one in found if one.installed and not one.wrong]
    # One process takes a third of the time of many. If it fails, each package gets its own.
    if _try("\n".join(f"import {module}" for module in sound)):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(tried, found))
    yield from found


def package(name: str, asked: str = "") -> Finding:
    """Looks for a package, and compares its version with what is needed.

    Args:
        name: the distribution.
        asked: the requirement in this package's metadata; empty if there is none.
    """
    from packaging.requirements import Requirement

    need = Requirement(asked or name)
    install = f"pip install '{need.name}{need.specifier}'"
    version = _version(name)
    if not version:
        needed = bool(asked) and need.marker is None
        wrong = f"it is not installed: {install}" if needed else ""
        return Finding(name, "not installed", wrong, installed=False)
    if need.specifier and not need.specifier.contains(version, prereleases=True):
        wrong = f"{version} is installed, {need.specifier} is needed: {install}"
        return Finding(name, version, wrong)
    return Finding(name, version)


def tried(found: Finding) -> Finding:
    """The finding of a package, after an import of what conda_dist uses of it."""
    if found.wrong or not found.installed:
        return found
    module = _module(found.name)
    failed = _try(f"import {module}")
    return replace(found, wrong=f"import {module}: {failed}" if failed else "")


def _module(name: str) -> str:
    """What conda_dist imports of a package, or the part of conda_dist that imports it."""
    if name == "transformers" and not _version("accelerate"):
        return name  # the job needs it alone
    return _IMPORTS.get(name, name.replace("-", "_"))


def _version(name: str) -> str:
    """The version of an installed distribution; empty if there is none."""
    try:
        return metadata.version(name) or "no version"
    except metadata.PackageNotFoundError:
        return ""


def devices() -> Iterator[Finding]:
    """CPUs and GPUs."""
    import torch

    threads = f"{torch.get_num_threads()} threads in torch"
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU", f"{os.cpu_count()} cores, {platform.machine()} {kind}, {threads}")
    driver = Path("/proc/driver/nvidia/version")
    there = driver.exists() or shutil.which("nvidia-smi") is not None
    built = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built = built or (torch.version.hip and f"ROCm {torch.version.hip}")
    if not torch.cuda.is_available():
        why = _try("import torch; torch.cuda.init()")
        wrong = f"there is an NVIDIA driver, but torch cannot use a GPU: {why}" if there else ""
        yield Finding("GPU", f"none; torch has {built or 'no CUDA'}", wrong)
        return
    said = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    yield Finding("GPU", f"{torch.cuda.device_count()}; torch has {built}; {said}")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
        yield Finding(f"GPU {index}", f"{card.name}, {memory}")


def backends() -> Iterator[Finding]:
    """What processes communicate with; each is tried in a group of one process."""
    import torch
    from torch import distributed

    gpu = torch.cuda.is_available()
    for name, device in (("gloo", "cpu"), ("nccl", "cuda")):
        if not distributed.is_available() or not distributed.is_backend_available(name):
            lost = device == "cpu" or gpu
            yield Finding(name, "not in this torch", "this torch does not have it" if lost else "")
            continue
        version = ""
        if name == "nccl":
            numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
            version = f" {'.'.join(map(str, numbers))}"
        if device == "cuda" and not gpu:
            yield Finding(name, f"in torch{version}; not tried without a GPU")
            continue
        failed = _try(
            "import torch, torch.distributed as dist\n"
            f"dist.init_process_group('{name}', store=dist.HashStore(), rank=0, world_size=1)\n"
            f"dist.all_reduce(torch.ones(1, device='{device}'))\n"
            "dist.destroy_process_group()"
        )
        yield Finding(name, f"in torch{version}; " + ("fails" if failed else "works"), failed)
    yield Finding("MPI launcher", shutil.which("mpirun") or "no mpirun in PATH")


def compiler() -> Iterator[Finding]:
    """The C++ compiler, which torch.compile needs, and DeepSpeed to communicate on CPUs."""
    import torch

    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    needed = _version("deepspeed") and not torch.cuda.is_available()
    wrong = "DeepSpeed on CPUs compiles its communication: install g++" if needed else ""
    yield Finding("C++ compiler", found or "none (torch.compile needs one)", "" if found else wrong)


def training() -> Iterator[Finding]:
    """Two steps of Conda on each kind of device."""
    import torch

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        failed = _try(f"from conda_dist.doctor import train; train('{device}')")
        yield Finding(
            f"Conda on {device}", "fails" if failed else "two steps reduce a loss", failed
        )


def train(device: str) -> None:
    """Takes two steps, each with a refresh.

    Args:
        device: torch's name of it.

    Raises:
        RuntimeError: the loss does not fall.
    """
    import torch

    from conda_dist.optimizer import Conda

    torch.manual_seed(0)
    model = torch.nn.Linear(16, 32, bias=False, device=device)
    inputs = torch.randn(64, 16, device=device)
    optimizer = Conda(model.parameters(), lr=0.05, update_proj_gap=1)
    losses = list[float]()
    for _ in range(3):
        loss = model(inputs).square().mean()
        losses.append(loss.item())
        loss.backward()
        if len(losses) <= 2:
            optimizer.step()
            optimizer.zero_grad()
    if not losses[0] > losses[1] > losses[2]:
        raise RuntimeError(f"the losses of two steps do not fall: {losses}")


def environment() -> Iterator[Finding]:
    """Variables that change what torch, its backends and DeepSpeed do."""
    for name in sorted(os.environ):
        if name.startswith(_PREFIXES):
            yield Finding("environment", f"{name}={os.environ[name]}")


def _try(code: str) -> str:
    """Runs code in a process of its own; returns why it failed, or an empty string."""
    command = [sys.executable, "-P", "-c", _ATTEMPT.format(code=code)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"it was not done after {_PATIENCE_S:.0f} s"
    if ended.returncode < 0:
        return f"it ended the process by signal {-ended.returncode}"
    said = [line for line in ended.stderr.splitlines() if line.strip()]
    return (said[-1] if said else f"exit code {ended.returncode}") if ended.returncode else ""


if __name__ == "__main__":
    raise SystemExit(main())
