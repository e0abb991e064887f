"""The wheel and the sdist: what is in them, and that they work where there is no checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conda_dist import doctor

ROOT = Path(__file__).parents[2]
SOURCES = {"conda_dist": "", "configs": "configs/", "integrations": "integrations/"}
SOURCES["launch"] = "launch/"
"""Folders of the checkout, and where in the package they are."""
BROUGHT = {"tyro": "torchtitan", "pytorch_optimizer": "nothing: a benchmark compares with it"}
"""What is imported and in no extra, with what brings it."""
BUILD = (
    "import sys; from setuptools import build_meta; "
    "print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
)


@dataclass(frozen=True)
class Built:
    """What was built and installed."""

    wheel: Path
    sdist: Path
    python: Path
    """Of an environment with the wheel, and with the packages that are installed here."""
    outside: Path
    """A folder without a checkout."""

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Runs Python there."""
        command = [str(self.python), *arguments]
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return _run(command, self.outside, {**kept, **environment})


def _run(
    command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def _build(kind: str, source: Path, out: Path) -> Path:
    """Builds without a network, and without an environment of its own."""
    ran = _run([sys.executable, "-c", BUILD, kind, str(out)], source)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds from a copy, as setuptools writes into the folder and takes what is left in it."""
    base = tmp_path_factory.mktemp("packaging")
    copy, outside = base / "checkout", base / "outside"
    for folder in (*SOURCES, "tests/helpers"):
        shutil.copytree(ROOT / folder, copy / folder)  # caches too, where there are some
    (copy / "launch/__pycache__").mkdir(exist_ok=True)
    (copy / "launch/__pycache__/left.cpython-311.pyc").touch()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    outside.mkdir()
    wheel, sdist = _build("wheel", copy, base), _build("sdist", copy, base)

    venv.create(base / "venv", symlinks=True)
    python = base / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    ran = _run([*pip, "--no-deps", "--quiet", str(wheel)], outside)
    assert ran.returncode == 0, ran.stderr
    # Only now: pip would find this checkout there. Python does not read the .pth files of a folder
    # that a .pth file names, so the checkout's own has no effect.
    (site,) = (base / "venv/lib").glob("python*/site-packages")
    paths = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "others.pth").write_text("\n".join(paths))
    return Built(wheel, sdist, python, outside)


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _modules() -> Iterator[tuple[str, Path]]:
    """Every module of the checkout that belongs to the package: its file there, and here."""
    for folder, place in SOURCES.items():
        for path in (ROOT / folder).rglob("*.py"):
            if "examples" not in path.parts:
                yield f"conda_dist/{place}{path.relative_to(ROOT / folder)}", path


def test_the_wheel_holds_modules_and_data_and_nothing_else(built: Built) -> None:
    expected = {name: path.read_bytes() for name, path in _modules()}
    data = [ROOT / "conda_dist/py.typed", *(ROOT / "configs").rglob("*.[tj][os][mo][ln]")]
    for path in data:
        name = str(path.relative_to(ROOT))
        expected[name if name.startswith("conda_dist") else f"conda_dist/{name}"] = (
            path.read_bytes()
        )
    assert "conda_dist/launch/job/trainer.py" in expected
    assert "conda_dist/configs/llama_7b.toml" in expected
    assert "conda_dist/configs/deepspeed/zero2.json" in expected
    found = _contents(built.wheel)
    others = [name for name in found if not name.startswith("conda_dist-")]
    assert sorted(others) == sorted(expected)
    assert {name: found[name] for name in others} == expected
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_the_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not list(source.rglob("*.pyc"))
    assert not (source / "tests").exists()
    again = _build("wheel", source, tmp_path)
    assert again.name == built.wheel.name
    assert _contents(again) == _contents(built.wheel)


IMPORT_ALL = """
import importlib, json, pkgutil, sys
import conda_dist
names = ["conda_dist.configs"]
for module in pkgutil.walk_packages(conda_dist.__path__, "conda_dist."):
    importlib.import_module(module.name)
    names.append(module.name)
from conda_dist.launch.tools import planned
assert (planned.CONFIGS / "llama_7b.toml").exists()
files = {module.__file__ for name, module in sys.modules.items() if name.startswith("conda_dist.")}
print(json.dumps([names, sorted(filter(None, files))]))
"""


TRAIN = """
import runpy
runpy.run_module("conda_dist.launch.pretrain", run_name="__main__", alter_sys=True)
"""


@pytest.mark.thorough
def test_every_module_imports_outside_the_checkout_and_the_job_trains(built: Built) -> None:
    """In one process: importing everything takes ten seconds of a core."""
    text = "".join(f"{i} times {i} is {i * i}\n" for i in range(3000))
    (built.outside / "text.txt").write_text(text)
    keys = {
        **{"output": "run", "data.path": "text.txt", "data.cache": "cache"},
        **{"model.hidden_size": 32, "model.intermediate_size": 64, "model.num_hidden_layers": 1},
        **{"model.num_attention_heads": 2, "tokenizer.vocab_size": 300},
        **{"training.steps": 2, "training.sequence_length": 16, "training.val_sequences": 4},
        **{"data.text_separator": r"\n", "metrics.tensorboard": "false"},
    }
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    ran = built.run("-c", IMPORT_ALL + TRAIN, *arguments, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names, files = next(json.loads(line) for line in ran.stdout.splitlines() if line[:2] == "[[")
    modules = {name.removesuffix(".py").replace("/", ".") for name, _ in _modules()}
    assert modules - {"conda_dist.__init__"} <= {*names, *(f"{name}.__init__" for name in names)}
    assert len(files) >= len(modules) - 1
    assert all(Path(file).is_relative_to(built.python.parents[1]) for file in files)
    lines = (built.outside / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (built.outside / "run/summary.json").exists()


def test_what_is_imported_is_declared(built: Built) -> None:
    """The package itself needs its dependencies alone, and all of it what some extra brings."""
    (text,) = (c for name, c in _contents(built.wheel).items() if name.endswith("/METADATA"))
    needs = [Requirement(line[15:]) for line in text.decode().splitlines() if line[:14] == NEED]
    always = {need.name for need in needs if need.marker is None}
    some = {need.name for need in needs if 'extra == "dev"' not in str(need.marker)} | {*BROUGHT}
    distributions = metadata.packages_distributions()
    for name, path in _modules():
        inner = name.split("/")[1] in ("integrations", "launch")
        for module in _imported(path):
            names = {found.lower() for found in distributions.get(module, [module])}
            assert names & (some if inner else always), f"{path} imports {module}"


NEED = "Requires-Dist:"


def _imported(path: Path) -> set[str]:
    """Top names of what a file imports from elsewhere."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names - {*sys.stdlib_module_names, "conda_dist"}


def test_extras_that_are_named_exist() -> None:
    """In what people read, and in what commands say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folders = [ROOT / folder for folder in SOURCES]
    texts = [
        path
        for folder in folders
        for kind in ("md", "py", "sh")
        for path in folder.rglob(f"*.{kind}")
    ]
    named = set[str]()
    for path in (*ROOT.glob("*.md"), *texts):
        for found in re.findall(
            r"(?:conda[-_]dist|install -e \"?\.)\[([\w,]+)\]", path.read_text()
        ):
            named |= set(found.split(","))
    assert "torchtitan" in named
    assert named <= set(project["optional-dependencies"])


def test_extras_install(built: Built) -> None:
    """Pip resolves the wheel with each extra to what is installed here, which the tests run on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ",".join(sorted(project["optional-dependencies"].keys() - {"dev"}))
    pip = [sys.executable, "-m", "pip", "--python", str(built.python), "install", "--no-index"]
    ran = _run([*pip, "--dry-run", f"{built.wheel}[{extras}]"], built.outside)
    assert ran.returncode == 0, ran.stderr
    assert "does not provide the extra" not in ran.stderr
    assert "deepspeed" in ran.stdout


@pytest.mark.thorough
def test_doctor(built: Built) -> None:
    """In the real environment, which is sound; it takes 15 seconds of a core."""
    mpi = next(Path(sys.prefix, "lib").glob("libmpi.so.*"), None)  # which mpi4py finds here only
    own = {"MPI4PY_LIBMPI": str(mpi)} if mpi else {}
    ran = built.run("-m", "conda_dist.doctor", NCCL_DEBUG="WARN", **own)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = dict(re.findall(r"^(\S+(?: \S+)*) {2,}(.*)$", ran.stdout, re.MULTILINE))
    assert lines["conda-dist"].endswith(str(Path("site-packages/conda_dist")))
    for name in ("torch", "deepspeed", "torchtitan", "transformers", "accelerate"):
        assert lines[name] == metadata.version(name)
    assert lines["gloo"].endswith("works")
    assert "two steps" in lines["Conda on cpu"]
    assert "environment    NCCL_DEBUG=WARN\n" in ran.stdout
    assert ran.stdout.endswith("Nothing is wrong.\n")


def _package(folder: Path, name: str, version: str, code: str) -> None:
    """Puts a package that is not sound into a folder."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def test_doctor_where_torch_cannot_be_imported(built: Built, tmp_path: Path) -> None:
    _package(tmp_path, "torch", "2.14.9", 'raise ImportError("libcudart.so.13:\\n no such file")')
    ran = built.run("-m", "conda_dist.doctor", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1, ran.stderr
    assert "WRONG: torch: import torch: ImportError: libcudart.so.13: no such file" in ran.stdout
    assert "gloo" not in ran.stdout
    assert not ran.stderr


def test_doctor_where_nothing_is_installed(tmp_path: Path) -> None:
    """Not even torch: it stops before what imports it."""
    shutil.copytree(ROOT / "conda_dist", tmp_path / "conda_dist")
    bare = [sys.executable, "-S", "-m", "conda_dist.doctor"]  # -S: without site-packages
    ran = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran.stderr
    assert "WRONG: conda-dist: it is not installed" in ran.stdout
    assert ran.stdout.endswith(
        "WRONG: packages: ModuleNotFoundError: No module named 'packaging'\n2 wrong\n"
    )
    assert not ran.stderr


@pytest.mark.parametrize(
    ("version", "code", "wrong"),
    [
        ("2.0", "import os; os.abort()", "import peft: it ended the process by signal 6"),
        ("2.0", "import nothing_such", "ModuleNotFoundError: No module named 'nothing_such'"),
        ("0.9", "", "0.9 is installed, >=1.2 is needed: pip install 'peft>=1.2'"),
        ("1.2", "", ""),
    ],
)
def test_doctor_says_what_is_wrong_with_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str, wrong: str
) -> None:
    _package(tmp_path, "peft", version, code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.tried(doctor.package("peft", 'peft>=1.2; extra == "adapters"'))
    assert found.found == version
    assert found.wrong.endswith(wrong)
    assert bool(found.wrong) == bool(wrong)


def test_doctor_and_a_package_that_is_not_there() -> None:
    found = doctor.package("no-such-thing", 'no-such-thing; extra == "some"')
    assert (found.found, found.wrong) == ("not installed", "")
    found = doctor.package("no-such-thing", "no-such-thing>=2")
    assert found.wrong == "it is not installed: pip install 'no-such-thing>=2'"


@pytest.mark.thorough
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="it links to a virtual environment")
def test_the_oldest_torch_may_only_be_left_out_if_the_index_lacks_it(tmp_path: Path) -> None:
    """Exit code 69 says so; an installation that fails for another reason is an error."""
    oldest = Requirement(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"][0]
    )
    (specifier,) = oldest.specifier
    checkout, index = tmp_path / "checkout", tmp_path / "index"
    index.mkdir()
    for name in ("pyproject.toml", "launch/setup_env.sh", "tests/oldest.sh"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    # The environment of these tests by another name, without its stamps; nothing is installed.
    env = checkout / f".venv-{specifier.version}"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "python").symlink_to(sys.executable)
    (env / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", env)
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    environment["PIP_DRY_RUN"] = "1"
    environment = {**os.environ, **environment}
    found = []
    for version in ("1.0.0", f"{specifier.version}.1"):
        with zipfile.ZipFile(index / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            metadata_of = f"torch-{version}.dist-info/METADATA"
            wheel.writestr(metadata_of, f"Name: torch\nVersion: {version}\n")
        ran = _run(["bash", "tests/oldest.sh"], checkout, environment)
        found.append(ran.returncode)
        assert "torch" in ran.stderr or "setuptools" in ran.stderr, ran.stderr
    assert found == [69, 1]
