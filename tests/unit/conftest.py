"""Fixtures of the unit tests."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch


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
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` cache what it reads in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
