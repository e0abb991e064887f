"""The layers of the package: who may import whom, and how much a file or a function may hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import conda_dist

PACKAGE = Path(conda_dist.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.glob("**/*.py"))
    if "launch" not in path.parts and "integrations" not in path.parts
}

PARAMETERS = (
    *("layer_kinds", "options", "routing", "parameter_groups"),
    *("replaced_parameters", "parameter_names"),
)
"""What parameters there are, and what is to be done with each: in files of the package itself."""

LAYERS = ("numerics", "layout", "parameters", "rules", "plan", "runtime", "optimizer")
"""The folders from the bottom to the top: a file may import its own layer and those before it."""

PLANS = tuple(name for name in FILES if name.startswith(("layout.", "plan.")))
PURE = (*PLANS, *(n for n in FILES if n.startswith(("numerics.", "rules."))), "reference")
"""No communication: not even torch.distributed's names."""

FILE_LINES, FUNCTION_LINES = 450, 75


def _layer(name: str) -> int:
    """The place of a module's layer among all."""
    folder = name.partition(".")[0]
    if name in ("rules.states", *PARAMETERS):  # the names of states are known to all
        return LAYERS.index("parameters")
    return LAYERS.index(folder if folder in LAYERS else "optimizer")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of all a file imports, wherever in it: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports hide where they lead"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _modules(path: Path) -> set[str]:
    """Modules of this package a file imports."""
    names = [name.split(".")[1:] for name in _imports(path) if name.split(".")[0] == "conda_dist"]
    # ``from conda_dist import Conda`` is an import of __init__, which is above everything.
    return {
        next((n for n in (".".join(name[:2]), ".".join(name[:1])) if n in FILES), "__init__")
        for name in names
    }


def test_there_is_something_to_look_at() -> None:
    assert set(PARAMETERS) | {"reference"} <= set(FILES)
    assert {name.partition(".")[0] for name in FILES if "." in name} == set(LAYERS) - {
        "parameters",
        "optimizer",
    }
    assert "conda_dist.rules.hyperparameters.hyper_of" in set(_imports(FILES["rules.conda"]))
    assert {"runtime.collectives", "plan.schedule"} <= _modules(FILES["runtime.refresh"])


@pytest.mark.parametrize("name", FILES)
def test_layers_point_one_way(name: str) -> None:
    above = {other for other in FILES if _layer(other) > _layer(name)} | {"__init__"}
    assert name == "__init__" or not _modules(FILES[name]) & above


def test_there_are_no_cycles() -> None:
    """Also among the modules between the layers."""
    graph = {name: _modules(path) - {name} for name, path in FILES.items() if name != "__init__"}
    while free := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other: {graph}"


@pytest.mark.parametrize("name", PURE)
def test_pure_layers_do_not_communicate(name: str) -> None:
    """Neither by themselves nor through what they import."""
    seen, todo = set[str](), {name}
    while todo:
        seen |= todo
        todo = set().union(*(_modules(FILES[module]) for module in todo)) - seen
    for module in seen:
        told = [i for i in _imports(FILES[module]) if i.startswith("torch.distributed")]
        assert not told, f"{name} reaches {told} through {module}"


@pytest.mark.parametrize(
    "name", ["numerics.low_precision", "numerics.precision", "layout.layout", "reference"]
)
def test_the_bottom_imports_nothing_of_the_package(name: str) -> None:
    assert not _modules(FILES[name])


def test_layouts_and_plans_need_no_torch() -> None:
    for name in PLANS:
        assert not [i for i in _imports(FILES[name]) if i.split(".")[0] == "torch"]


def test_collectives_are_called_in_one_module() -> None:
    for name, path in FILES.items():
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("dist.")
        ]
        assert name == "runtime.collectives" or not calls, f"{name} calls {calls}"


@pytest.mark.parametrize("name", FILES)
def test_the_optimizer_does_not_know_its_users(name: str) -> None:
    users = ("conda_dist.integrations", "conda_dist.launch", "transformers", "deepspeed")
    assert not [i for i in _imports(FILES[name]) if i.startswith(users)]


@pytest.mark.parametrize("name", FILES)
def test_sizes(name: str) -> None:
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert docstring
    assert docstring.split("\n")[0].endswith((".", ":"))
