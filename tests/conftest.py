"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch

import ranks


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    ranks.close()
