"""The base of the sections of the configuration: frozen pydantic models, and types of their keys.

The declaration of each key holds its type, bounds and choices.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from zods.config.config_errors import AUTO

SECTION = "zeroth_order"


def _not_auto(value: str) -> str:
    """Refuse the text "auto". Types other than text refuse it anyway."""
    if value == "auto":
        raise ValueError(AUTO)
    return value


Count = Annotated[int, Field(ge=1)]
# each direction takes forwards, a seed and up to 6 bytes of the log
NumDirections = Annotated[int, Field(ge=1, le=1 << 16)]
Text = Annotated[str, AfterValidator(_not_auto)]


class Section(BaseModel):
    """A section of the configuration.

    No value is converted to its declared type, except a whole number to a float.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    # keys of earlier versions, with what to do instead
    replaced: ClassVar[dict[str, str]] = {}
