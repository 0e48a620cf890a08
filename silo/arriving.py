"""A group that another host would move here, as the program that decides about it sees it.

::

    async for offer in host.offers():
        group = await offer.accept({"disk": silo.FileDevice("/srv/disk.img", size)}, store="s3://bucket/prefix")
        await group.wait_running()

What a peer sends names neither a path nor a store: both come from whoever accepts. Until the claim nothing here is
durable, so an arrival that comes to nothing leaves nothing behind; whatever this host knew of an earlier stay of
the group is forgotten when the group arrives again, because the source owns it now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from silo.abc import BlockDevice, ObjectStore, Workload
from silo.chunkmap import ChunkMap
from silo.errors import InvalidRequestError
from silo.exports.nbd_tls import NbdTls
from silo.geometry import Geometry
from silo.group import CopyLimits, Group
from silo.hosted import HostedGroup
from silo.opening import NO_INCARNATION, VolumeSpec, owners_of, remember
from silo.p2p.reception import IncomingOffer
from silo.records import Identity, VolumeGeometry
from silo.resuming import RESUME_RECORD
from silo.statedir import GroupState
from silo.storelink import StoreLink, without_secrets
from silo.sync.claim import Owner, owner_of
from silo.sync.settings import FetchSettings, SyncSettings

__all__ = ["Arrival", "prepare_arrival"]


class Accepts(Protocol):
    """The host, as an arrival needs it."""

    async def accept(
        self,
        offer: IncomingOffer,
        devices: Mapping[str, BlockDevice | VolumeSpec],
        *,
        store: str | ObjectStore | None,
        sync: SyncSettings | None,
        fetch: FetchSettings | None,
        workload: Workload | None,
        copies: CopyLimits | None,
        export: str | None,
        tls: NbdTls | None,
        flush: str,
    ) -> HostedGroup:
        """Take the group in."""


class Arrival:
    """See the module. Either `accept` or `refuse` it; an offer that is left alone is given up by its source."""

    def __init__(self, offer: IncomingOffer, host: Accepts) -> None:
        self._offer = offer
        self._host = host

    @property
    def group(self) -> str:
        """The name of the group."""
        return self._offer.group

    @property
    def peer(self) -> str:
        """Where the offer came from, for people."""
        return self._offer.peer

    @property
    def volumes(self) -> dict[str, Geometry]:
        """The volumes that need a device here, and their geometry."""
        return {volume.name: volume.geometry() for volume in self._offer.volumes}

    @property
    def used_bytes(self) -> int:
        """About as much of the devices will hold data."""
        return sum(volume.used for volume in self._offer.volumes)

    async def accept(
        self,
        devices: Mapping[str, BlockDevice | VolumeSpec],
        *,
        store: str | ObjectStore | None = None,
        sync: SyncSettings | None = None,
        fetch: FetchSettings | None = None,
        workload: Workload | None = None,
        copies: CopyLimits | None = None,
        export: str | None = None,
        tls: NbdTls | None = None,
        flush: str = "local",
    ) -> HostedGroup:
        """Take the group in, onto these devices; what they hold gives way. Returns while it is being copied.

        ``export`` serves it over NBD at this address from the beginning, with ``tls`` as `Host.export` does: clients
        wait until the group is ours. See
        `HostedGroup.wait_running` for whether anything comes of it. When this raises, the source is told why.
        """
        return await self._host.accept(
            self._offer,
            devices,
            store=store,
            sync=sync,
            fetch=fetch,
            workload=workload,
            copies=copies,
            export=export,
            tls=tls,
            flush=flush,
        )

    def refuse(self, message: str) -> None:
        """Tell the source why not. The source's guest runs on there."""
        self._offer.refuse(message)


async def prepare_arrival(
    offer: IncomingOffer,
    group: Group,
    state: GroupState,
    link: StoreLink | None,
    specs: Mapping[str, VolumeSpec],
) -> None:
    """Put the offered volumes on their devices, everything absent, and forget what was here before.

    `InvalidRequestError` when this host must not take the group in.
    """
    await _forget_earlier(state, link)
    geometries = {volume.name: volume.geometry() for volume in offer.volumes}
    if set(geometries) != set(specs):
        raise InvalidRequestError(
            f"the offer has the volumes {', '.join(geometries)}, and there are devices for {', '.join(specs)}"
        )
    place = without_secrets(link.store.url) if link is not None else ""
    volumes = tuple(
        VolumeGeometry(name, shape.size, shape.chunk_size, shape.block_size)
        for name, shape in geometries.items()
    )
    # Epoch 0: never ours. Whoever finds this after a restart, and no handover beside it, does not serve it.
    await remember(state, Owner(0, NO_INCARNATION), place, volumes)
    for name, geometry in geometries.items():
        absent = bytes(geometry.chunk_count)
        opened = await state.open_volume(name, geometry, absent)
        chunks = ChunkMap(opened.buffer, geometry.chunk_count)
        spec = specs[name]
        group.add(name, spec.device, geometry, chunks=chunks, keeper=opened, read_only=spec.read_only)
    if link is not None:
        await link.look()
        link.attach(group)


async def _forget_earlier(state: GroupState, link: StoreLink | None) -> None:
    # The record of a resumption that was never finished here says nothing: the source owns the group now.
    if names := [name for name in await state.record_names() if name != RESUME_RECORD]:
        raise InvalidRequestError(
            f"group {state.name} has an unfinished migration here ({', '.join(names)})",
            hint="open the group here to let it finish",
        )
    identity = await state.read_identity()
    if identity is not None and identity.epoch and (link is None or not identity.register):
        raise InvalidRequestError(
            f"group {state.name} has been opened on this host, and no store can say which one is newer",
            hint=f"remove {state.path} if the one that arrives is",
        )
    if identity is not None and identity.epoch and link is not None:
        await _refuse_ours(identity, state, link)
    await state.forget()


async def _refuse_ours(identity: Identity, state: GroupState, link: StoreLink) -> None:
    """What is here counts for as long as the register names us: then the host that offers the group is mistaken."""
    if identity.register != without_secrets(link.store.url):
        raise InvalidRequestError(
            f"group {state.name} was kept in {identity.register} when it was here",
            hint=f"accept it with that store, or remove {state.path}",
        )
    head = await link.register.read()
    if head is not None and owner_of(head) in owners_of(identity):
        raise InvalidRequestError(
            f"group {state.name} belongs to this host and to no other",
            hint="open it here to store what it has",
        )
