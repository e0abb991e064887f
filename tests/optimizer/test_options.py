"""Every option is declared once: what is written elsewhere agrees with the declaration."""

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import toys
from conda_dist import Conda
from conda_dist.launch.job import options as job
from conda_dist.options import GROUP_OPTIONS, OPTIONS, Options, dtype_of
from conda_dist.parameter_groups import DROPPED, UNSUPPORTED

README = (Path(__file__).parents[2] / "conda_dist" / "README.md").read_text()
TORCHS = ("lr", "betas", "eps", "weight_decay")
"""What every Adam of torch's has."""
OWN = (
    *("scale", "adamw_scale", "update_proj_gap", "correct_bias", "nesterov"),
    *(
        "preset",
        "basis_source",
        "refresh_method",
        "refresh_delay",
        "matmul_dtype",
        "basis_dtype",
        "basis_budget",
    ),
    *("state_dtype", "second_moment_dtype", "stochastic_rounding", "buffer_bytes"),
    "diagnostics_every",
)
"""A new option must be argued for, and then be written here."""


def test_the_options_are_these() -> None:
    assert tuple(OPTIONS) == (*TORCHS, *OWN)
    assert tuple(GROUP_OPTIONS) == (*TORCHS, *OWN[:5])
    for option in OPTIONS.values():
        assert option.help
        assert "\n" not in option.help
        option.check(option.default)


def test_the_constructor_takes_them() -> None:
    taken = dict(inspect.signature(Conda.__init__).parameters)
    assert list(taken)[: len(OPTIONS) + 3] == ["self", "params", *OPTIONS, "process_group"]
    assert {*list(taken)[len(OPTIONS) + 3 :]} == {*DROPPED, *UNSUPPORTED}
    for name, option in OPTIONS.items():
        assert taken[name].default == option.config_default, name
        assert (torch.dtype in get_args(taken[name].annotation)) == (option.is_dtype), name


def test_the_docstring_describes_them() -> None:
    described = re.findall(r"^    (\w+): ", inspect.getdoc(Conda) or "", re.M)
    assert described[: len(OPTIONS) + 2] == ["params", *OPTIONS, "process_group"]


def _shown(default: Any) -> str:
    """A default as the README writes it."""
    if isinstance(default, str):
        return f'`"{default}"`'
    if type(default) is int and default % 2**20 == 0 and default:
        return f"{default // 2**30} GiB" if default % 2**30 == 0 else f"{default // 2**20} MiB"
    return str(default)


def test_the_readme_lists_them() -> None:
    table = README.split("| option | default | what it does |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| ", table, re.M)
    own = [(name, _shown(OPTIONS[name].default)) for name in OWN]
    assert rows == [*own, ("process_group", "None")]


def test_the_job_has_them() -> None:
    keys = {n.rpartition(".")[2]: k for n, k in job.SCHEMA.items() if ".conda." in n}
    assert keys.keys() == {*OPTIONS, "grad_clip"}
    for name, option in OPTIONS.items():
        assert keys[name].default == option.config_default, name
        assert keys[name].help == option.config_help


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.is_dtype])
def test_dtypes_by_name(name: str) -> None:
    for choice in OPTIONS[name].choices:
        by_name = Options(**{name: choice})
        assert getattr(by_name, name) == (choice if choice == "tf32" else dtype_of(choice))
        if choice != "tf32":
            assert by_name == Options(**{name: dtype_of(choice)})


def _trained(**options: Any) -> list[torch.Tensor]:
    params = toys.parameters((6, 4), (4, 6))
    optimizer = Conda([{"params": params, "algorithm": "conda"}], update_proj_gap=2, **options)
    toys.take(optimizer, params, toys.gradients(params, 5))
    return [param.detach() for param in params]


def test_tf32_is_float32_on_a_cpu_and_sets_nothing() -> None:
    flags = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    for basis in (None, "bfloat16"):
        ours, theirs = (
            _trained(matmul_dtype=given, basis_dtype=basis) for given in ("tf32", torch.float32)
        )
        assert all(map(torch.equal, ours, theirs))
    now = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    assert now == flags
