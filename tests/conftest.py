"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
import torch

from zods.kernels import backend


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, except in tests that set another number themselves.

    Most tensors here are tiny, so several threads mostly wait for each other. With several threads
    on a busy machine with two cores, a test took up to nine times the CPU time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpp() -> None:
    """Skip the test where no C++ compiler is at hand, so that the reference serves CPU tensors."""
    if backend() != "cpp":
        pytest.skip("no C++ compiler: the reference serves")
