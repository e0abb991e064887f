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

ORDER = (
    "maths",
    "hyperparameters",
    "decomposition",
    "layout",
    "compute_layout",
    "flat",
    "packing",
    "transfer",
    "plan.weight_plan",
    "plan.compute_groups",
    "plan.schedule",
    "plan.costs",
    "exchange",
    "storage",
    "states",
    "groups",
    "rules.rule",
    "rules.conda",
    "rules.muon",
    "runtime.scratch",
    "runtime.weight",
    "runtime.background",
    "runtime.refresh",
    "runtime.saved_state",
    "runtime.step",
    "matrix_optimizer",
    "optimizer",
    "muon",
)
"""From the bottom to the top; a module may import those before it."""

PLANS = (
    "layout",
    "compute_layout",
    "flat",
    "packing",
    "transfer",
    *(n for n in FILES if n.startswith("plan.")),
)
RULES = tuple(name for name in FILES if name.startswith("rules."))
PURE = ("maths", "decomposition", *PLANS, *RULES, "reference")
"""No communication: not even torch.distributed's names."""

FILE_LINES, FUNCTION_LINES = 450, 75


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
    assert set(ORDER) | set(PURE) <= set(FILES)
    assert "conda_dist.hyperparameters.hyper_of" in set(_imports(FILES["rules.conda"]))
    assert {"exchange", "plan.schedule", "maths"} <= _modules(FILES["runtime.refresh"])


@pytest.mark.parametrize("name", ORDER)
def test_layers_point_one_way(name: str) -> None:
    above = set(ORDER[ORDER.index(name) + 1 :]) | {"__init__"}
    assert not _modules(FILES[name]) & above


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


@pytest.mark.parametrize("name", ["maths", "decomposition", "layout", "reference"])
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
        assert name == "exchange" or not calls, f"{name} calls {calls}"


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
