"""What a checkpoint of first-order training may name, besides tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from zods.training.first_order_checkpoint import CLASSES_IN_CHECKPOINTS, flaw_of_pickle


class ByGetattr:
    """Pickles as Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.pickled = (getattr, (kind, name))

    def __reduce__(self) -> Any:
        return self.pickled


@pytest.mark.parametrize(
    ("kind", "name", "is_fine"),
    [
        (ZeroStageEnum, "weights", True),
        (ZeroStageEnum, "__init__", False),
        (dict, "fromkeys", False),
    ],
)
def test_getattr_gives_the_members_of_an_enumeration_alone(kind, name, is_fine, tmp_path: Path):
    torch.save({"stage": ByGetattr(kind, name)}, tmp_path / "a.pt")
    with torch.serialization.safe_globals(CLASSES_IN_CHECKPOINTS):
        assert (flaw_of_pickle(tmp_path / "a.pt") == "") == is_fine
        if is_fine:
            assert torch.load(tmp_path / "a.pt", weights_only=True) == {"stage": kind[name]}
