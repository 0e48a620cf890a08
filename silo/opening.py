"""How a group is opened on this host: whose is it, what of it is here, and what must come from the store.

The questions are asked in this order, because each may end it without harm:

1. Is the state directory free? (its lock)
2. May we own the group? (the register, compared with what the state directory remembers)
3. For each volume: is there a map of it here? Then that is what is on the device. Else, does the store have it?
   Then everything is absent and comes from there. Else the volume is new, and the device's own content is it.

What a claim is about to make ours is written down *before* it can take effect, so that a host that dies right
after the claim still recognises itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import msgspec

from silo.abc import BlockDevice, ObjectStore
from silo.chunkmap import ChunkMap, Residency
from silo.errors import FencedError, InvalidRequestError, InvariantError
from silo.geometry import BLOCK_SIZE_DEFAULT, CHUNK_SIZE_DEFAULT, Geometry
from silo.group import Group
from silo.p2p.handover import Mark
from silo.p2p.records import (
    HANDOVER_RECORD,
    OFFER_RECORD,
    decode_handover_record,
    decode_offer_record,
)
from silo.records import Attempt, Identity, VolumeGeometry
from silo.statedir import GroupState
from silo.storelink import StoreLink, without_secrets
from silo.sync.claim import Expectation, Owner, Seen, owner_of
from silo.sync.head import Head, VolumeInfo
from silo.sync.register import Prepare
from silo.volumestate import states_of_extents

__all__ = [
    "Unfinished",
    "VolumeSpec",
    "claim_group",
    "open_volumes",
    "owners_of",
    "preparation",
    "read_unfinished",
    "remember",
    "remember_generation",
    "remember_taken",
    "remember_volumes",
]

NO_INCARNATION = "0" * 16
"""Of a group without a store, where nothing is named after it."""


@attrs.frozen
class VolumeSpec:
    """A device, and how it is divided. ``chunk_size`` ``None``: as before, or 64 KiB for a new volume."""

    device: BlockDevice
    chunk_size: int | None = None
    read_only: bool = False
    overwrite: bool = False
    """The device may hold something else, which gives way to what the store, a peer or an import has."""
    import_from: str = ""
    """A disk of an NBD server, as a URI (`silo.exports.nbd_uri`), that a new volume begins with (`silo.importing`)."""


@attrs.frozen
class Unfinished:
    """The records of migrations that an earlier process did not see the end of."""

    offer: bytes | None = None
    """Somebody else may own the group: only the arbiter knows."""
    handover: bytes | None = None
    is_undecided: bool = False
    """The arbiter must be asked before the group is served here. Not when it was evacuated to here: then it is ours
    as if it had never been elsewhere, and only its source may not know yet that it is not needed."""


async def read_unfinished(state: GroupState) -> Unfinished:
    """What is left of earlier migrations. A group that has left for good is forgotten first."""
    offer = await state.read_record(OFFER_RECORD)
    if offer is not None and decode_offer_record(offer).mark is Mark.RELEASED:
        await state.forget(last=OFFER_RECORD)
        return Unfinished()
    handover = await state.read_record(HANDOVER_RECORD)
    if offer is not None:
        # A group leaves only when it was evacuated to here, so the offer is the later of the two.
        return Unfinished(offer=offer, is_undecided=True)
    if handover is None:
        return Unfinished()
    evacuated = decode_handover_record(handover).mark is Mark.EVACUATED
    return Unfinished(handover=handover, is_undecided=not evacuated)


async def claim_group(
    state: GroupState,
    link: StoreLink | None,
    specs: Mapping[str, VolumeSpec],
    *,
    force: bool,
    after_lease: bool = False,
    arrived: bool = False,
) -> Head | None:
    """Become the owner, here and in the store. Returns the head, ``None`` without a store. ``arrived``: everything
    of it has come to this host, perhaps before the host wrote down that it is the owner.

    `FencedError` when another host owns the group, `InvalidRequestError` when it must not be opened here.
    """
    identity = await state.read_identity()
    place = without_secrets(link.store.url) if link is not None else ""
    if identity is not None and identity.register not in ("", place):
        raise InvalidRequestError(
            f"group {state.name} is kept in {identity.register}",
            hint="open it with that store; a new state directory and an empty disk start afresh with another one",
        )
    if identity is not None and identity.epoch == 0 and identity.volumes and not arrived:
        raise FencedError(
            f"group {state.name} began to arrive at this host and never did",
            hint="its source owns it; it can be moved here again",
        )
    if link is None:
        await remember(state, Owner(identity.epoch + 1 if identity else 1, NO_INCARNATION), "")
        return None
    if identity is not None and not identity.register:
        await _refuse_stored(state.name, link)
    sizes = await _chunk_sizes(identity, link, specs)
    infos = [
        VolumeInfo(name, spec.device.size, sizes[name], BLOCK_SIZE_DEFAULT) for name, spec in specs.items()
    ]
    is_here = bool(await state.volume_names())
    try:
        head = await link.claim_opening(
            _expectation(identity, is_here=is_here, force=force, after_lease=after_lease), infos
        )
    except FencedError as error:
        raise _explained(error, state, identity, is_here=is_here) from error
    await remember(state, owner_of(head), place, generation=head.generation)
    return head


def owners_of(identity: Identity | None) -> list[Owner]:
    """Every owner that is this host."""
    if identity is None:
        return []
    own = [Owner(identity.epoch, identity.incarnation)] if identity.register and identity.epoch else []
    return own + [Owner(attempt.epoch, attempt.incarnation) for attempt in identity.claims]


def _expectation(identity: Identity | None, *, is_here: bool, force: bool, after_lease: bool) -> Expectation:
    """Over which head the group may be opened. With a map here nothing can be forced: what is on the disk continues
    the head of this host, and no other."""
    owners = owners_of(identity)
    seen = Seen(identity.epoch, identity.generation) if identity and identity.register else Seen()
    if not is_here:
        return Expectation.restoring(owners, seen, forced=force, after_lease=after_lease)
    return attrs.evolve(Expectation.opening(*owners), seen=seen)


def _explained(
    error: FencedError, state: GroupState, identity: Identity | None, *, is_here: bool
) -> FencedError:
    """Why the group is not opened, and what to do instead."""
    if is_here and identity is not None:
        return FencedError(
            f"{error.message}; what is here was last written in epoch {identity.epoch}",
            hint="nothing here was changed. Move the group here from that host; or, to have what the store has, move "
            f"{state.path} and the disks away and open it with new ones",
        )
    return FencedError(
        error.message,
        hint="move it from that host, or stop the daemon there, which releases it. If that host is dead for certain, "
        "say so: --host-is-dead, host_is_dead=True; if it had a lease: --after-lease, after_lease=True",
    )


def _chunk_size(spec: VolumeSpec, identity: Identity | None, name: str) -> int:
    known = {volume.name: volume.chunk_size for volume in identity.volumes} if identity else {}
    return spec.chunk_size or known.get(name, CHUNK_SIZE_DEFAULT)


async def _chunk_sizes(
    identity: Identity | None, link: StoreLink, specs: Mapping[str, VolumeSpec]
) -> dict[str, int]:
    """As `_chunk_size`; of a volume that only the store knows, what the store says."""
    known = {volume.name for volume in identity.volumes} if identity else set()
    head = None if known.issuperset(specs) else await link.register.read()
    stored = {volume.name: volume.chunk_size for volume in head.volumes} if head else {}
    return {
        name: spec.chunk_size or stored.get(name) or _chunk_size(spec, identity, name)
        for name, spec in specs.items()
    }


async def _refuse_stored(name: str, link: StoreLink) -> None:
    """A group that was served without a store cannot be taken for one of the same name that is in the store."""
    head = await link.register.read()
    if head is not None and head.generation:
        raise InvalidRequestError(
            f"the store has a group {name} already, which is not the one on this disk",
            hint="give the group another name, or another prefix in the store",
        )


def preparation(state: GroupState, store: ObjectStore) -> Prepare:
    """What writes down, before each claim in this store, whom it is about to make the owner.

    Until it is known whether the claim took effect (`remember`), the head may name the owner of before or this one.
    """
    place = without_secrets(store.url)

    async def prepare(owner: Owner, _nonce: str) -> None:
        old = await state.read_identity()
        if old is None:
            old = Identity(group=state.name, epoch=0, incarnation=NO_INCARNATION)
        claims = (*old.claims, Attempt(owner.epoch, owner.incarnation))
        await state.write_identity(msgspec.structs.replace(old, register=place, claims=claims))

    return prepare


async def remember(
    state: GroupState,
    owner: Owner,
    register: str,
    volumes: tuple[VolumeGeometry, ...] | None = None,
    *,
    generation: int = 0,
) -> None:
    """Write down who we are, and the newest generation that is known. Without ``volumes`` the known ones stay."""
    old = await state.read_identity()
    await state.write_identity(
        Identity(
            group=state.name,
            epoch=owner.epoch,
            incarnation=owner.incarnation,
            register=register,
            generation=generation,
            volumes=volumes if volumes is not None else (old.volumes if old else ()),
        )
    )


async def open_volumes(
    group: Group,
    state: GroupState,
    link: StoreLink | None,
    head: Head | None,
    specs: Mapping[str, VolumeSpec],
    *,
    imported: Mapping[str, Callable[[Geometry], bytearray]] | None = None,
) -> None:
    """Put the volumes on their devices, each with the map that tells the truth about it.

    ``imported``: for volumes that come from elsewhere, what their maps begin with when there are none yet.
    """
    identity = await state.read_identity()
    here = set(await state.volume_names())
    if link is not None and head is not None and head.generation and not here.issuperset(specs):
        await link.look()
    for name, spec in specs.items():
        stored = head.volume(name) if head is not None and head.generation else None
        geometry = _geometry(f"{group.name}/{name}", spec, stored, _chunk_size(spec, identity, name))
        if name in here:
            fresh = bytearray(geometry.chunk_count)  # not used: there is a map
        elif stored is not None and link is not None:
            fresh = await _absent(link, name, spec, geometry)
        elif imported is not None and name in imported:
            fresh = imported[name](geometry)
        else:
            fresh = states_of_extents(geometry, await spec.device.data_extents())
        opened = await state.open_volume(name, geometry, fresh)
        chunks = ChunkMap(opened.buffer, geometry.chunk_count)
        group.add(name, spec.device, geometry, chunks=chunks, keeper=opened, read_only=spec.read_only)
    if link is not None:
        link.attach(group)
    await remember_volumes(group, state)


async def reopen_volumes(
    group: Group, state: GroupState, link: StoreLink | None, specs: Mapping[str, VolumeSpec]
) -> None:
    """Put the volumes of an unfinished migration back on their devices, just as they were left. Claims nothing."""
    identity = await state.read_identity()
    known = {volume.name: volume.geometry for volume in identity.volumes} if identity is not None else {}
    if set(known) != set(specs):
        raise InvalidRequestError(
            f"group {group.name} has the volumes {', '.join(sorted(known))}",
            hint="it is in the middle of a migration: open it with the devices that it had",
        )
    for name, geometry in known.items():
        opened = await state.open_volume(name, geometry, bytes(geometry.chunk_count))
        chunks = ChunkMap(opened.buffer, geometry.chunk_count)
        spec = specs[name]
        group.add(name, spec.device, geometry, chunks=chunks, keeper=opened, read_only=spec.read_only)
    if link is not None:
        await link.look()
        link.attach(group)


def _geometry(name: str, spec: VolumeSpec, stored: VolumeInfo | None, chunk_size: int) -> Geometry:
    if stored is None:
        return Geometry(spec.device.size, chunk_size)
    if spec.chunk_size not in (None, stored.chunk_size):
        raise InvalidRequestError(f"{name} has chunks of {stored.chunk_size} bytes, not {spec.chunk_size}")
    return stored.geometry


async def _absent(link: StoreLink, name: str, spec: VolumeSpec, geometry: Geometry) -> bytearray:
    """The states of a volume that is in the store and not here."""
    has_content = bool(await spec.device.data_extents())
    if has_content and not spec.overwrite:
        raise InvalidRequestError(
            f"the device for {name} has content, but nothing here says that it is that of the stored volume",
            hint="name a new file, or say overwrite=true to replace what the device holds",
        )
    chunks = ChunkMap.filled(geometry.chunk_count, Residency.ABSENT_STORE)
    link.mark_absent(name, chunks, device_is_zero=not has_content)
    return bytearray(chunks.states)


async def remember_volumes(group: Group, state: GroupState) -> None:
    """Write down the volumes of the group and their geometry."""
    identity = await state.read_identity()
    if identity is None:
        raise InvariantError(f"group {group.name} was opened before its owner was written down")
    volumes = tuple(
        VolumeGeometry(name, shape.size, shape.chunk_size, shape.block_size)
        for name, shape in ((volume.name, volume.geometry) for volume in group.volumes.values())
    )
    await state.write_identity(msgspec.structs.replace(identity, volumes=volumes))


async def remember_generation(state: GroupState, link: StoreLink | None) -> None:
    """Write down the newest generation of ours, so that a store that forgets it is noticed."""
    identity = await state.read_identity()
    head = link.register.head if link is not None else None
    if identity is not None and head is not None and owner_of(head) in owners_of(identity):
        await remember(state, owner_of(head), identity.register, generation=head.generation)


async def remember_taken(group: Group, state: GroupState, link: StoreLink | None) -> None:
    """A migration has made the group ours, or ours again: write down the owner and the volumes."""
    identity = await state.read_identity()
    owner = link.register.owner if link is not None else None
    if owner is None and identity is not None and identity.epoch == 0:
        owner = Owner(1, NO_INCARNATION)
    if owner is not None:
        await remember(state, owner, identity.register if identity else "")
    await remember_volumes(group, state)
