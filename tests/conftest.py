"""Fixtures for all tests, their order, and which of them are quick."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import ranks

# The same examples in every run, on machines of any speed; FUZZ_EXAMPLES (fuzz.py) tries others.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

THOROUGH = ("fuzz", "slow")
"""Folders whose tests are all thorough."""
LONG = (*THOROUGH, "launch")
"""Folders of long modules."""


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    ranks.close()


def pytest_collection_finish() -> None:
    """Takes all that has been imported out of what each collection of garbage goes through."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --quick."""
    parser.addoption(
        "--quick",
        action="store_true",
        help="of each test that is not thorough the first case, or all if each runs other code",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the tests, and leaves out what --quick does: see CONTRIBUTING.md."""
    items.sort(key=_order)
    if config.getoption("--quick"):
        seen: set[str] = set()
        left_out = []
        for item in items[:]:
            name = item.nodeid.partition("[")[0]
            again = name in seen and item.get_closest_marker("each_case") is None
            if again or _is_thorough(item):
                left_out.append(item)
                items.remove(item)
            seen.add(name)
        config.hook.pytest_deselected(items=left_out)


def _order(item: pytest.Item) -> tuple[bool, bool]:
    """Long modules first, so that no process has one to itself at the end, and DeepSpeed's last.

    ZeRO leaves its mark on nn.Module, with which torchtitan's classes cannot be made any more, and
    starting all processes anew for each of its modules takes a minute.
    """
    return "deepspeed" in item.path.stem, _folder(item) not in LONG


def _is_thorough(item: pytest.Item) -> bool:
    return _folder(item) in THOROUGH or item.get_closest_marker("thorough") is not None


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]
