"""All ranks of a run have the same plan: compared with rank 0's before the first step."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from lightning import Trainer

from distill.errors import ConfigError

Fact = str | dict[str, str]
"""A setting as text, or a listing by name."""


def check_agreement(trainer: Trainer, own: Mapping[str, Fact], advice: str) -> None:
    """Refuse, on every rank, to begin where some rank's facts are not rank 0's; all ranks have to call this.

    Args:
        trainer: tells rank and world size, and carries the messages.
        own: this rank's facts by name.
        advice: what to do about a difference.

    Raises:
        ConfigError: naming each rank that differs, its host, and in what.
    """
    strategy = trainer.strategy
    first = strategy.broadcast(dict(own))
    mine = [difference(name, own[name], first[name]) for name in own if own[name] != first[name]]
    if strategy.reduce_boolean_decision(not mine, all=True):
        return
    text = f"\n  rank {trainer.global_rank} on {socket.gethostname()}: {'; '.join(mine)}" if mine else ""
    texts = [strategy.broadcast(text, src=rank) for rank in range(trainer.world_size)]
    raise ConfigError(f"Ranks of this run differ from rank 0.{''.join(texts)}\n{advice}")


def difference(name: str, own: Fact, first: Fact) -> str:
    """Say in what a fact differs from rank 0's; of a listing, the first entry that does, and how many do."""
    if isinstance(own, str) or isinstance(first, str):
        return f"{name} is {own}, and {first} on rank 0"
    entries = sorted(entry for entry in own.keys() | first.keys() if own.get(entry) != first.get(entry))
    entry = entries[0]
    here, there = (listing.get(entry, "missing") for listing in (own, first))
    return f"{name} differs in {len(entries)} place(s), the first being {entry}: {here}, and {there} on rank 0"
