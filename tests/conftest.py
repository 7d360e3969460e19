"""Fixtures of all tests."""

import pytest

from zods.kernels import backend


@pytest.fixture
def cpp() -> None:
    """Skip the test where no C++ compiler is at hand, so that the reference serves CPU tensors."""
    if backend() != "cpp":
        pytest.skip("no C++ compiler: the reference serves")
