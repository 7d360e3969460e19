"""Run several forwards of one model so that they wait for each other at its modules.

Each forward is a greenlet: all run in one thread, and one goes on when another waits.
`zods.forward.module_runners` runs one forward per point in this way, so that ZeRO-3 gathers a
module's parameters once for all points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import greenlet
import torch
from deepspeed.accelerator import get_accelerator


class NotInLockstep(RuntimeError):
    """The forwards at different points call different modules."""


class LockstepScheduler:
    """Switches between forwards that wait for each other.

    round: grows whenever all forwards have come to the same module.
    """

    def __init__(self, names: Mapping[torch.nn.Module, str]) -> None:
        """names: of the modules, for messages."""
        self._names = names
        self._hub: greenlet.greenlet | None = None  # runs `run`, switches between the forwards
        self._outside: _Contexts | None = None
        self.round = 0

    def run(
        self, call: Callable[[int], Any], number: int, resume: Callable[[int], None]
    ) -> list[Any]:
        """Return [call(k) for k in range(number)]. Each call waits for the others in `wait`.

        resume: called with k before forward k continues. Raises NotInLockstep if the forwards do
        not wait at the same modules.
        """
        self._hub = greenlet.getcurrent()
        self._outside = _Contexts()
        forwards = [greenlet.greenlet(functools.partial(call, k)) for k in range(number)]
        results: list[Any] = [None] * number
        order = list(range(number))
        try:
            while order:
                self.round += 1
                waiting_at: list[torch.nn.Module] = []
                for k in order:
                    resume(k)
                    found = forwards[k].switch()
                    if forwards[k].dead:
                        results[k] = found
                    else:
                        waiting_at.append(found)
                if waiting_at and (
                    len(waiting_at) < number or len({id(m) for m in waiting_at}) > 1
                ):
                    names = ", ".join(sorted({self._names[m] for m in waiting_at}))
                    raise NotInLockstep(
                        f"the forwards at different points call different modules, e.g. {names}"
                    )
                # DeepSpeed's hooks on the whole model run in forward 0, which starts first and has
                # to end last
                order = [] if not waiting_at else list(reversed(range(number)))
        finally:
            for k, forward in enumerate(forwards):
                if not forward.dead and forward:
                    resume(k)
                    forward.throw()
            self._hub = None
        return results

    def wait(self, module: torch.nn.Module) -> None:
        """Wait until all forwards have come to this module."""
        assert self._hub is not None
        assert self._outside is not None
        contexts = _Contexts()
        self._outside.enter()
        try:
            self._hub.switch(module)
        finally:
            contexts.enter()


class _Contexts:
    """The thread's autocast and grad state, saved when it is made and restored by `enter`.

    The state belongs to the thread, and all forwards share it.
    """

    def __init__(self) -> None:
        devices = {"cpu", get_accelerator().device_name()}
        self._autocast = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices
        ]
        self._cache, self._grad = torch.is_autocast_cache_enabled(), torch.is_grad_enabled()

    def enter(self) -> None:
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self._cache)
        torch.set_grad_enabled(self._grad)
