"""One group's link to its store: holds, claims whose outcome is open, and closing in every condition."""

from __future__ import annotations

import asyncio

import pytest

from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import FencedError, InvalidRequestError, InvariantError, UnavailableError
from silo.geometry import BLOCK_SIZE_DEFAULT, CHUNK_SIZE_DEFAULT
from silo.group import Group
from silo.p2p.terms import Terms, Verdict
from silo.storelink import StoreLink, without_secrets
from silo.sync.claim import Expectation, Owner
from silo.sync.head import VolumeInfo
from silo.sync.memory_store import MemoryStore
from silo.sync.settings import SyncSettings

SIZE = 1 << 20
INFO = VolumeInfo("disk", SIZE, CHUNK_SIZE_DEFAULT, BLOCK_SIZE_DEFAULT)
LAZY = SyncSettings(rpo_s=3600)


class Scene:
    """A store, and links to it that remember what they prepared."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.store = MemoryStore(self.clock)
        self.prepared: list[Owner] = []

    async def _prepare(self, owner: Owner, _nonce: str) -> None:
        self.prepared.append(owner)

    async def link(self) -> StoreLink:
        """A new one, as a host opens it."""
        client = self.store.client()
        return await StoreLink.open(
            "vm1", client, self.clock, prepare=self._prepare, owns_store=True, sync=LAZY
        )

    def group(self) -> Group:
        """A group on memory."""
        group = Group("vm1", self.clock)
        group.add("disk", MemoryDevice(SIZE))
        return group


def terms(link: StoreLink, nonce: str = "theirs") -> Terms:
    """What the owner would offer now."""
    standing = link.standing()
    return Terms(
        epoch=standing.epoch, incarnation=standing.incarnation, generations=standing.generations, nonce=nonce
    )


async def test_after_a_claim_nothing_is_read_from_an_older_generation() -> None:
    """The owner commits after the target has looked: what it hands over as stored is what the newest head has."""
    scene = Scene()
    source, target = await scene.link(), await scene.link()
    async with asyncio.TaskGroup() as tasks:
        await source.claim_opening(Expectation.opening(), [INFO])
        here = scene.group()
        await source.start(here, tasks)
        assert source.syncer is not None
        await here.volumes["disk"].write(0, b"old")
        await source.syncer.sync_now()

        await target.look()
        there = Group("vm1", scene.clock)
        chunks = ChunkMap.filled(SIZE // CHUNK_SIZE_DEFAULT, Residency.ABSENT_STORE)
        there.add("disk", MemoryDevice(SIZE), chunks=chunks)
        target.attach(there)
        await here.volumes["disk"].write(0, b"new")
        await source.syncer.sync_now()

        await target.claim(terms(source))
        reading = tasks.create_task(there.volumes["disk"].read(0, 3))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reading.done()
        await target.start(there, tasks)
        assert bytes(await reading) == b"new"
        await target.close(drain=False)
        await source.close(drain=False)


async def test_a_hold_before_the_start_counts_and_so_does_its_release() -> None:
    """A restarted source holds and releases before there is anything that commits."""
    scene = Scene()
    for released in (False, True):
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            link, group = await scene.link(), scene.group()
            await link.claim_opening(Expectation.opening(*scene.prepared[-1:]), [INFO])
            for _ in range(2):
                await link.hold_commits()
            if released:
                for _ in range(2):
                    await link.release_commits()
            await link.start(group, tasks)
            assert link.status is not None
            assert bool(link.status.holds) is not released
            if released:
                await group.volumes["disk"].write(0, b"x")
                assert link.syncer is not None
                assert await link.syncer.sync_now() == 1
            await link.close(drain=False)
            await link.close(drain=False)


async def test_a_reclaim_is_won_again_after_a_restart_and_lost_to_the_target() -> None:
    """The same nonce gives the same answer, whoever asks."""
    scene = Scene()
    async with asyncio.timeout(20):
        source = await scene.link()
        await source.claim_opening(Expectation.opening(), [INFO])
        offered = terms(source)
        assert await source.reclaim(offered, "ours") is Verdict.WON
        restarted = await scene.link()
        assert await restarted.reclaim(offered, "ours") is Verdict.WON
        target = await scene.link()
        later = terms(restarted, "later")
        assert await target.claim(later) == later.epoch + 1
        assert await restarted.reclaim(later, "ours again") is Verdict.LOST
        third = await scene.link()
        await third.claim_opening(Expectation.force(), [INFO])
        assert await restarted.reclaim(later, "ours again") is Verdict.FENCED
        for link in (source, restarted, target, third):
            await link.close(drain=False)
    assert [owner.epoch for owner in scene.prepared][:2] == [1, 2]


async def test_closing_while_a_claim_is_under_way() -> None:
    """The claim is cancelled by whoever asked for it; closing does not wait for the store."""
    scene = Scene()
    async with asyncio.timeout(20):
        link = await scene.link()
        scene.store.offline = True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await link.claim_opening(Expectation.opening(), [INFO])
        await link.close()
        scene.store.offline = False
        again = await scene.link()
        head = (
            await again.claim_opening(Expectation.opening(*scene.prepared), [INFO])
            if scene.prepared
            else None
        )
        head = head or await again.claim_opening(Expectation.opening(), [INFO])
        assert head.epoch >= 1
        await again.close(drain=False)


async def test_a_store_that_is_away_when_a_group_starts_and_when_it_ends() -> None:
    """Starting can be repeated; closing says how much is exposed, and gives everything back all the same."""
    scene = Scene()
    impatient = SyncSettings(rpo_s=3600, drain_timeout_s=0.2)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        client = scene.store.client()
        link = await StoreLink.open(
            "vm1", client, scene.clock, prepare=scene._prepare, owns_store=True, sync=impatient
        )
        await link.claim_opening(Expectation.opening(), [INFO])
        group = scene.group()
        await link.start(group, tasks)
        await link.start(group, tasks)
        await group.volumes["disk"].write(0, b"exposed")
        scene.store.offline = True
        with pytest.raises(UnavailableError, match="65536 bytes"):
            await link.close()
        await link.close()
    assert group.exposed_bytes == 65536


async def test_a_link_that_was_not_claimed_offers_nothing() -> None:
    """And a generation is used only after it was looked at."""
    scene = Scene()
    async with asyncio.timeout(20):
        link = await scene.link()
        with pytest.raises(InvariantError):
            link.standing()
        with pytest.raises(InvariantError):
            link.mark_absent("disk", scene.group().volumes["disk"].chunks, device_is_zero=True)
        assert await link.look() is None
        assert link.status is None
        assert link.fetched_bytes == 0
        await link.close()


async def test_a_proof_is_found_only_in_the_same_store() -> None:
    """And not any more once it was erased."""
    one, other = Scene(), Scene()
    async with asyncio.timeout(20):
        source, target, stranger = await one.link(), await one.link(), await other.link()
        token = await source.write_proof()
        await target.check_proof(token)
        with pytest.raises(InvalidRequestError, match="another store"):
            await stranger.check_proof(token)
        await source.erase_proof(token)
        with pytest.raises(InvalidRequestError):
            await target.check_proof(token)
        for link in (source, target, stranger):
            await link.close()


def test_secrets_are_not_written_down() -> None:
    """What follows the place in a URL stays out of records."""
    assert without_secrets("s3://bucket/prefix?secret=hunter2") == "s3://bucket/prefix"


async def test_a_commit_of_the_new_owner_says_that_everything_has_arrived() -> None:
    """A claim alone does not, nor does a commit of somebody else."""
    scene = Scene()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        source, target = await scene.link(), await scene.link()
        await source.claim_opening(Expectation.opening(), [INFO])
        offered = terms(source)
        assert not await source.has_committed(offered)
        await target.claim(offered)
        assert not await source.has_committed(offered)
        group = scene.group()
        await target.start(group, tasks)
        assert target.syncer is not None
        await group.volumes["disk"].write(0, b"new here")
        await target.syncer.sync_now()
        assert await source.has_committed(offered)
        assert not await source.has_committed(terms(target, "another migration"))
        await target.close(drain=False)
        await source.close(drain=False)


@pytest.mark.parametrize("won", [False, True])
async def test_a_target_that_lost_the_group_knows_whether_it_may_have_had_it(won: bool) -> None:
    """What its guest may have written is kept; what only was on its way is not."""
    scene = Scene()
    source, target, third = await scene.link(), await scene.link(), await scene.link()
    try:
        await source.claim_opening(Expectation.opening(), [INFO])
        offered = terms(source)
        if won:
            await target.claim(offered)
        await third.claim_opening(Expectation.force(), [INFO])
        again = await scene.link()
        try:
            with pytest.raises(FencedError):
                await again.claim(offered)
            assert await again.may_have_won(offered) is won
            scene.store.offline = True
            assert await again.may_have_won(offered), "in doubt it may"
            scene.store.offline = False
        finally:
            await again.close(drain=False)
    finally:
        for link in (source, target, third):
            await link.close(drain=False)
