"""The section "replicas" of the configuration, and its checks."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import NonNegativeInt, PositiveFloat

from zods.config.section import SECTION, Section, Text
from zods.config.selector_section import SelectorConfig


class ReplicasConfig(Section):
    """Several DeepSpeed worlds that train one model together. See `zods.training.replicas`."""

    store: Text  # "host:port"; replica 0 listens there and the others connect to it
    index: NonNegativeInt = 0  # unique for each replica; replica 0 leads
    # seconds without a heartbeat after which a replica is left out
    silence_timeout: PositiveFloat = 30.0
    # seconds that a step waits for a replica after the leader's own sums; null: while it lives
    straggler_timeout: PositiveFloat | None = None
    # seconds that the others wait for a leader that has not started or is gone
    leader_timeout: PositiveFloat = 300.0
    # file with the run's secret token; null: the environment variable ZODS_REPLICA_TOKEN
    token_file: Text | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of `store`."""
        host, _, port = self.store.rpartition(":")
        return host.strip("[]"), int(port)


def replicas_mistakes(replicas: ReplicasConfig, selector: SelectorConfig | None) -> Iterator[str]:
    """Yield a message for each key that does not fit the others."""
    host, _, port = replicas.store.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        yield f'{SECTION}.replicas.store: found {replicas.store!r}, expected "host:port".'
    if selector is not None and selector.strategy == "greedi":
        yield (
            f'{SECTION}.selector.strategy: "greedi" depends on the number of ranks, which may differ '
            'between replicas. Use "greedy".'
        )
    if host.strip("[]") in ("0.0.0.0", "::", "*"):
        yield (
            f"{SECTION}.replicas.store: found {replicas.store!r}, which is every network interface. "
            "Give the address of one interface of the leading replica's host."
        )
