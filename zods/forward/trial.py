"""The failure of a model in a forward that is a trial.

A model may do anything in a use that it was not written for. Then the use is refused, and the run
goes on.
"""

from __future__ import annotations

from typing import Any

from zods.comm.communicator import is_lost_connection
from zods.comm.stop_request import StopRequested
from zods.params.zero3_adapter import release_gathered


def failure_of(error: Exception, deepspeed_engine: Any) -> str:
    """Describe the error of a trial, and release what the forward left gathered.

    Raises `error` itself where it is not the model's: a request to stop, or a lost connection.
    """
    if is_lost_connection(error) or isinstance(error, StopRequested):
        raise error
    release_gathered(deepspeed_engine)
    return f"{type(error).__name__}: {str(error)[:300]}"
