"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import ranks

# The same examples in every run, on machines of any speed; FUZZ_EXAMPLES (fuzz.py) tries others.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    ranks.close()


ALONE = {
    f"test_{name}"
    for name in (
        *("endurance", "launch_faults", "launch_hosts", "launch_processes", "multihost"),
        *("slurm", "soak"),
    )
}
"""Modules whose tests signal, kill or time processes."""


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks those that must run alone, and puts DeepSpeed's last.

    ZeRO leaves its mark on nn.Module, with which torchtitan's classes cannot be made any more, and
    starting all processes anew for each of its modules takes a minute.
    """
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker("alone")
    items.sort(key=lambda item: "deepspeed" in item.path.stem)
