"""Waking a hibernated group on any host: the other end of `silo.leaving`.

The head of a hibernated group names the saved state of its workload. To resume it is: read that state, and verify it;
write a record; claim the group; serve it at once, with everything still in the store; give the workload its state;
let commits begin. Until the workload runs nothing is committed, so that the head goes on naming the state: a resumption
that fails gives the group back as it was, and one whose host dies can be repeated, there or anywhere.

The record says to a restarted process that the workload may not have been woken yet. Whether it was, the maps know:
commits are held, so whatever it has written is dirty. Then it ran, and is not woken a second time with a state
older than its disks.
"""

from __future__ import annotations

import logging
from typing import Final

import attrs

from silo.abc import Clock, ObjectStore
from silo.errors import CorruptionError, InvalidRequestError, SiloError
from silo.group import Group
from silo.hooks.runner import WorkloadRunner
from silo.statedir import GroupState
from silo.storelink import StoreLink
from silo.sync.head import Head, PartRef
from silo.sync.register import Register
from silo.sync.store_url import open_store

__all__ = [
    "RESUME_RECORD",
    "Resumption",
    "begin_resumption",
    "end_resumption",
    "refuse_hibernated",
    "stored_head",
]

logger = logging.getLogger(__name__)

RESUME_RECORD: Final = "resume"
"""Name of the record."""


@attrs.frozen
class Resumption:
    """A workload to be woken."""

    state: bytes
    part: PartRef
    """Where it is in the store."""

    def check(self, head: Head | None) -> None:
        """The claimed head must be the one that was looked at. `CorruptionError` when another one slipped in."""
        if head is None or head.resume != self.part:
            raise CorruptionError(
                "the group was resumed by somebody else meanwhile", hint="look at its state again"
            )

    async def wake(self, group: Group, guest: WorkloadRunner) -> None:
        """Let the workload go on, unless it has run before; then its writes are dirty, because commits are held."""
        if not group.exposed_bytes:
            await guest.prepare()
            await guest.resume(self.state)
            await guest.unquiesce()


async def begin_resumption(state: GroupState, link: StoreLink | None) -> Resumption:
    """Before the claim: fetch the workload's state, hold commits, and write down what is about to happen.

    `InvalidRequestError` when the group is not hibernated; `CorruptionError` when the state is damaged.
    """
    head = await link.register.read() if link is not None else None
    if link is None or head is None or head.resume is None:
        raise InvalidRequestError(
            f"group {state.name} is not hibernated", hint="open it, or look for it in another store"
        )
    saved = await link.read_state(head)
    await state.write_record(RESUME_RECORD, b"")
    await link.hold_commits()
    return Resumption(saved, head.resume)


async def end_resumption(state: GroupState, link: StoreLink) -> None:
    """The workload runs: commits begin. A record that stays would only be looked at once more."""
    await link.release_commits()
    try:
        await state.delete_record(RESUME_RECORD)
    except SiloError as error:
        logger.warning("group %s: a record of its resumption stays: %s", state.name, error)


async def refuse_hibernated(state: GroupState, link: StoreLink | None, *, cold: bool) -> None:
    """A group is about to be opened without its workload's state. `InvalidRequestError` unless there is none, or it
    is given up on purpose (``cold``)."""
    is_waking = await state.read_record(RESUME_RECORD) is not None
    head = await link.register.read() if link is not None else None
    if head is not None and (head.is_hibernated or (is_waking and head.resume is not None)) and not cold:
        raise InvalidRequestError(
            f"group {state.name} is hibernated",
            hint="resume it; or open it cold, which gives the saved state of its workload up",
        )
    if is_waking:
        await state.delete_record(RESUME_RECORD)


async def stored_head(store: str | ObjectStore, name: str, clock: Clock) -> Head | None:
    """What the store has of a group; ``None`` when it has nothing. `UnavailableError` when it does not answer."""
    opened = open_store(store, clock) if isinstance(store, str) else store
    try:
        return await Register(opened, name, clock).read()
    finally:
        if isinstance(store, str):
            await opened.aclose()
