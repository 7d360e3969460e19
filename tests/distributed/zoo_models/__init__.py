"""A zoo of tiny models of many kinds.

`tests/distributed/test_zoo.py` trains each for a few steps.
"""

from __future__ import annotations

from tests.distributed.zoo_models.adapters import ADAPTERS
from tests.distributed.zoo_models.language import LANGUAGE
from tests.distributed.zoo_models.media import MEDIA
from tests.distributed.zoo_models.plain import PLAIN
from tests.distributed.zoo_models.readers import READERS
from tests.distributed.zoo_models.subject import Subject

SUBJECTS: dict[str, Subject] = {**READERS, **PLAIN, **LANGUAGE, **MEDIA, **ADAPTERS}
