"""From a cut to a commit: upload, checkpoint if due, compare-and-swap, and the map brought up to date.

The head that a commit writes lists what the present head lists (or nothing, after a checkpoint), then what is
pending. Nothing is committed when that changes nothing. A segment is listed only by the owner under which it was
uploaded: when the epoch has changed meanwhile (the group was offered to another host and taken back), what is
pending is dropped and the cut must be taken again, because collectors of a later epoch sweep earlier ones.

One call at a time; the syncer sees to that.
"""

from __future__ import annotations

import msgspec

from silo.abc import Clock, ObjectStore
from silo.dirtymap import restore
from silo.errors import CapacityError, CorruptionError, InvariantError, SiloError, UnavailableError
from silo.frozen import Cut
from silo.group import Group
from silo.heatmap import HeatMap
from silo.sync.ahead import Round
from silo.sync.amendments import Amendments
from silo.sync.checkpointer import Checkpoint, changed_bytes, write_checkpoint
from silo.sync.claim import Owner
from silo.sync.codec import digest_of
from silo.sync.head import Head, PartRef, VolumeInfo, WriterState
from silo.sync.layout import FEATURE_ENCRYPTED, PREAMBLE_SIZE, Magic, pack_preamble
from silo.sync.manifest import Manifest
from silo.sync.pending import Pending
from silo.sync.planner import checkpoint_due
from silo.sync.register import Register
from silo.sync.sender import ObjectSender
from silo.sync.settings import SyncSettings
from silo.sync.traffic import Traffic
from silo.sync.uploader import Uploader
from silo.sync.workers import Workers

__all__ = ["Committer", "volume_infos"]


def volume_infos(group: Group) -> tuple[VolumeInfo, ...]:
    """The volumes of a group as its head lists them."""
    return tuple(
        VolumeInfo(name, volume.geometry.size, volume.geometry.chunk_size, volume.geometry.block_size)
        for name, volume in group.volumes.items()
    )


class Committer:
    """See the module."""

    def __init__(
        self,
        group: Group,
        register: Register,
        store: ObjectStore,
        manifest: Manifest,
        clock: Clock,
        settings: SyncSettings,
        directory: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.manifest = manifest
        self.sender = ObjectSender(store, group.name, settings, clock, traffic)
        self.map_error: SiloError | None = None
        """Why the last checkpoint that was due could not be written. Commits go on without it."""
        self.amendments = Amendments()
        """What the next commit shall change beside the content."""
        self._group = group
        self._register = register
        self._settings = settings
        self._workers = Workers(settings.threads, keys=manifest.keys)
        self._pending = Pending(manifest, directory)
        self._pending_owner: Owner | None = None
        self._uploader = Uploader(group.name, manifest, self._pending, self.sender, self._workers, settings)

    @property
    def elided_chunks(self) -> int:
        """Chunks that were not stored because the store had their content already."""
        return self._uploader.elided_chunks

    @property
    def under_way(self) -> frozenset[str]:
        """Keys of objects that are stored, or being stored, and in no head yet."""
        hot = self.amendments.hot
        return frozenset(
            (
                *(segment.key for segment in self._pending.segments),
                *self.sender.in_flight,
                *((hot.key,) if hot else ()),
            )
        )

    async def store_part(self, data: bytes) -> PartRef:
        """Store an object of its own for a part that an amendment is going to name. As `ObjectSender.send`."""
        name = self.sender.name(self._owner())
        sealer = self.sender.sealer(name, self.manifest.keys)
        if sealer is not None:
            data = sealer.part(data, PREAMBLE_SIZE)
        buffers = [pack_preamble(Magic.PAGES, FEATURE_ENCRYPTED if sealer else 0), data]
        size = PREAMBLE_SIZE + len(data)
        await self.sender.enter(size)
        try:
            await self.sender.send(name, buffers, size)
        finally:
            self.sender.leave(size)
        return PartRef(name.key, PREAMBLE_SIZE, len(data), digest_of(data).hex())

    def retire(self, segments: frozenset[str]) -> None:
        """Chunks in these segments are stored again when they are in a cut, even if their content is the same."""
        self._pending.retiring = segments

    def is_idle(self, cut: Cut) -> bool:
        """Whether there is nothing at all to do for this cut, not even a checkpoint that cannot wait."""
        if self._pending.segments:
            return False  # uploaded ahead of it: only a commit may settle that
        overdue = len(self.manifest.head.segments) >= 4 * self._settings.checkpoint_segments
        changed = volume_infos(self._group) != self.manifest.head.volumes
        return cut.is_empty and not (overdue or changed or self.amendments.changes(self.manifest.head))

    async def upload(self, cut: Cut) -> Checkpoint | None:
        """Store what the commit of the cut will refer to. Goes on for as long as the store does not answer.

        `CapacityError` when there is no room for copies or for the map any more.
        """
        owner = self._check_owner()
        await self._uploader.upload(cut, owner, self._heats())
        return await self._write_checkpoint(owner)

    def begin(self) -> None:
        """Right before a round or a take: what was uploaded under an earlier epoch counts no more."""
        owner = self._owner()
        if owner != self._pending_owner:
            self.forget()
            self._pending_owner = owner

    def forget(self) -> None:
        """Nothing that is pending will be committed, so what was taken for it is dirty."""
        self._pending.clear()
        self.give_back()

    def give_back(self) -> None:
        """What was taken is dirty, because nobody will commit it. Not while a cut is in progress that goes on."""
        for volume in self._group.volumes.values():
            restore(volume.chunks)

    async def upload_ahead(self, round_: Round) -> None:
        """Store a round; its chunks are in-cut then. When this raises or is cancelled they are dirty. As `upload`."""
        self.begin()
        try:
            await self._uploader.upload(round_, self._owner(), self._heats())
            self._check_owner()
        except BaseException:
            round_.give_back()
            raise
        if error := self._keep():
            raise error

    def _heats(self) -> dict[str, HeatMap]:
        return {name: volume.heat for name, volume in self._group.volumes.items()}

    def _check_owner(self) -> Owner:
        """Raise when the epoch has changed since `begin`, and see to it that nothing from before is referred to."""
        owner = self._owner()
        if owner != self._pending_owner:
            self.forget()
            raise UnavailableError(
                f"the epoch of group {self._group.name} changed while it was uploaded",
                hint="it is taken again",
            )
        return owner

    async def _write_checkpoint(self, owner: Owner) -> Checkpoint | None:
        head = self.manifest.head
        wanted = self.amendments.wants_checkpoint and bool(head.segments)
        due = wanted or checkpoint_due(
            segments=len(head.segments),
            soft_limit=self._settings.checkpoint_segments,
            page_bytes=changed_bytes(self.manifest),
            stored_bytes=sum(segment.size for segment in head.segments),
        )
        if not due:
            return None
        try:
            made = await write_checkpoint(self.manifest, self.sender, owner, self._settings.segment_size)
        except (CorruptionError, UnavailableError) as error:
            # A page of the old map cannot be read. The chunks of the cut must not wait for it.
            self.map_error = error
            return None
        self.map_error = None
        self.amendments.wants_checkpoint = False
        return made

    async def commit(self, cut: Cut, checkpoint: Checkpoint | None) -> None:
        """Put what `upload` has stored into the head, and end the cut. Nothing is sent when nothing has changed.

        Raises as `Register.commit`; the cut is then as it was.
        """
        self._check_owner()
        if cut.overflowed:
            raise CapacityError("there was no room to keep old content for the cut", hint="it is taken again")
        following = self._following(cut, checkpoint)
        if following is None:
            cut.commit()
            return
        head = await self._register.commit(following)
        cut.commit()
        try:
            if checkpoint is not None:
                checkpoint.adopted(self.manifest)
            await self.manifest.committed(head, self._pending.indexes())
        except SiloError as error:
            # The map in memory is not what was committed: nothing may be compared with it any more.
            raise InvariantError(f"a commit could not be taken over: {error}") from error
        self._pending.clear()

    def abandoned(self) -> None:
        """The cut will not be committed: keep what is stored for the next one, if there is room to remember it."""
        self._keep()

    def _keep(self) -> SiloError | None:
        """Remember what is stored and not committed; or, when that cannot be, forget all of it, and say why."""
        try:
            self._pending.carry_over()
        except SiloError as error:
            # Half of a map is worse than none: what it lacks would be compared with an older one.
            self.forget()
            return error
        return None

    def _following(self, cut: Cut, checkpoint: Checkpoint | None) -> Head | None:
        head = self._register.head
        if head is None:
            raise InvariantError("a commit was tried before the claim")
        volumes = volume_infos(self._group)
        # A checkpoint has other objects, so it is another generation: records and the floor tell them by the number.
        changes = bool(self._pending.segments) or volumes != head.volumes or checkpoint is not None
        amended = self.amendments.applied(head)
        if not changes and amended == head:
            return None
        listed = head.segments if checkpoint is None else ()
        return msgspec.structs.replace(
            amended,
            generation=head.generation + changes,
            cut_time=cut.time_wall if changes else head.cut_time,
            state=WriterState.OPEN,
            resume=None if changes else head.resume,
            volumes=volumes,
            root=head.root if checkpoint is None else checkpoint.root,
            segments=listed + self._pending.segments,
            seq=max(
                head.seq,
                self._pending.last_seq,
                checkpoint.last_seq if checkpoint else 0,
                self.amendments.last_seq(head.epoch),
            ),
        )

    def _owner(self) -> Owner:
        owner = self._register.owner
        if owner is None:
            raise InvariantError("a cut was uploaded before the claim")
        return owner

    def close(self) -> None:
        """Let the threads end and give temporary space back. Not while a call is in progress."""
        self._workers.close()
        self._pending.close()
