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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts DeepSpeed's last.

    ZeRO leaves its mark on nn.Module, with which torchtitan's classes cannot be made any more, and
    starting all processes anew for each of its modules takes a minute.
    """
    items.sort(key=lambda item: "deepspeed" in item.path.stem)
