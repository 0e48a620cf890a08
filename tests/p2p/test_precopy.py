"""The planner: nothing missing is ever forgotten, nothing is sent without need, and the order is by heat."""

from __future__ import annotations

import random

import numpy as np
import pytest

from silo.errors import RemoteProtocolError
from silo.geometry import Geometry
from silo.p2p.precopy import Order, Planner, dequantise, quantise
from tests.support.seeds import seeds

CHUNK = 4096


def geometry(chunks: int) -> Geometry:
    return Geometry(chunks * CHUNK, CHUNK)


def chunks_of(*chunks: int) -> np.ndarray:
    return np.array(chunks, dtype=np.int64)


def no_heat(volume: int, first: int, limit: int) -> np.ndarray:
    return np.zeros(limit - first, dtype=np.uint8)


def take_all(planner: Planner, size: int = 4 * CHUNK) -> list[tuple[int, int]]:
    """Send everything, and say in which order."""
    sent = []
    while (batch := planner.take_batch(size)) is not None:
        planner.launched(batch, len(batch.chunks), len(batch.chunks) * CHUNK)
        sent += [(batch.volume, int(chunk)) for chunk in batch.chunks]
    return sent


def started(
    planner: Planner, *changed: np.ndarray, order: Order = Order.COLDEST_FIRST, ranks=no_heat
) -> None:
    planner.begin_round()
    for volume, chunks in enumerate(changed):
        planner.changed(volume, chunks)
    planner.set_order(order, ranks)


def test_a_round_sends_everything_once():
    """Every changed chunk of every volume, in pieces of the asked size, and then nothing."""
    planner = Planner([geometry(100), geometry(10)])
    started(planner, np.arange(0, 100, 3), chunks_of(9))
    sent = take_all(planner)
    assert sorted(sent) == [(0, c) for c in range(0, 100, 3)] + [(1, 9)]
    assert not planner.is_settled
    planner.landed(len(sent))
    assert planner.is_settled
    assert planner.missing(0).tolist() == []
    assert planner.unique_bytes == planner.wanted_bytes == planner.flying_bytes == 0


def test_an_acknowledgement_of_older_content_does_not_count():
    """A chunk that changed while it flew stays missing until its newest content is acknowledged."""
    planner = Planner([geometry(10)])
    started(planner, chunks_of(1, 2))
    take_all(planner)
    started(planner, chunks_of(2))
    planner.landed(2)
    assert planner.missing(0).tolist() == [2]
    assert take_all(planner) == [(0, 2)]
    planner.landed(1)
    assert planner.missing(0).tolist() == []


def test_an_old_acknowledgement_behind_a_newer_push_does_not_count():
    """With two versions of a chunk under way, only the acknowledgement of the second one counts."""
    planner = Planner([geometry(10)])
    started(planner, chunks_of(2))
    take_all(planner)
    started(planner, chunks_of(2))
    take_all(planner)
    planner.landed(1)
    assert planner.missing(0).tolist() == [2]
    planner.landed(1)
    assert planner.missing(0).tolist() == []


def test_a_lost_link_makes_what_flew_wanted():
    """What was acknowledged is not sent again, what was not is; hot chunks likewise."""
    planner = Planner([geometry(10)])
    started(planner, chunks_of(1, 2, 3))
    planner.want(0, chunks_of(7))
    planner.set_order(Order.COLDEST_FIRST, no_heat)
    assert [chunk for _, chunk in take_all(planner, CHUNK)] == [1, 2, 3, 7]
    planner.landed(2)
    planner.link_lost()
    planner.set_order(Order.COLDEST_FIRST, no_heat)
    assert planner.missing(0).tolist() == [3]
    assert [chunk for _, chunk in take_all(planner, CHUNK)] == [3, 7]


def test_order_before_and_after_the_switchover():
    """Unique before hot; before the switchover the coldest first, afterwards the hottest first."""
    heat = {0: np.array([0, 200, 40, 0, 200, 40], dtype=np.uint8)}
    for order, expected in (
        (Order.COLDEST_FIRST, [0, 2, 1, 3, 5, 4]),
        (Order.HOTTEST_FIRST, [1, 2, 0, 4, 5, 3]),
    ):
        planner = Planner([geometry(6)])
        started(planner, chunks_of(0, 1, 2))
        planner.want(0, chunks_of(3, 4, 5))
        planner.set_order(order, lambda volume, first, limit: heat[volume][first:limit])
        assert [chunk for _, chunk in take_all(planner, CHUNK)] == expected


def test_what_a_commit_covers_need_not_come_from_us():
    """Chunks that the last commit has are neither missing nor sent; hot ones stay."""
    planner = Planner([geometry(10)])
    started(planner, chunks_of(1, 2, 3, 4))
    planner.want(0, chunks_of(8))
    take_all(planner, 2 * CHUNK)[:2]
    planner.link_lost()
    planner.keep_unique(0, chunks_of(2, 4))
    planner.set_order(Order.HOTTEST_FIRST, no_heat)
    assert planner.missing(0).tolist() == [2, 4]
    assert sorted(take_all(planner)) == [(0, 2), (0, 4), (0, 8)]
    assert planner.unique_bytes == 2 * CHUNK


def test_neighbours_follow_a_demand_and_are_not_pushed_again():
    """A demand takes the wanted chunks behind it along."""
    planner = Planner([geometry(40)])
    started(planner, chunks_of(3, 5, 6, 7, 30))
    assert planner.take_neighbours(0, 5, 2).tolist() == [5, 6, 7]
    assert take_all(planner) == [(0, 3), (0, 30)]
    assert planner.unique_bytes == 2 * CHUNK


def test_only_what_is_needed():
    """After a reconnection the target's word counts, not ours."""
    planner = Planner([geometry(10), geometry(10)])
    started(planner, chunks_of(1, 2, 3), chunks_of(4))
    take_all(planner)
    planner.only([chunks_of(9), chunks_of()])
    planner.set_order(Order.HOTTEST_FIRST, no_heat)
    assert take_all(planner) == [(0, 9)]
    planner.landed(1)
    assert planner.is_settled


def test_too_many_acknowledgements_are_the_peers_fault():
    """Nobody acknowledges what was not sent."""
    planner = Planner([geometry(10)])
    started(planner, chunks_of(1))
    take_all(planner)
    with pytest.raises(RemoteProtocolError):
        planner.landed(2)


def test_one_frame_may_stand_for_many_chunks():
    """A run of zeros is one frame: its acknowledgement lands all of its chunks."""
    planner = Planner([geometry(100)])
    started(planner, np.arange(100))
    batch = planner.take_chosen(0, np.arange(10, 90))
    planner.launched(batch, 1, 500)
    assert planner.flying_bytes == 500
    planner.landed(1)
    assert planner.flying_bytes == 0
    assert planner.missing(0).tolist() == [*range(10), *range(90, 100)]


@pytest.mark.parametrize("seed", seeds(20))
def test_missing_is_exactly_what_the_target_lacks(seed):
    """Under random writes, losses and acknowledgements, the planner and a plain model agree on what is missing."""
    chance = random.Random(seed)
    count = 50
    planner = Planner([geometry(count)])
    newest = [0] * count
    at_target = [0] * count
    wire: list[tuple[int, int]] = []
    dirty = set(range(0, count, 2))
    for chunk in dirty:
        newest[chunk] = 1
    for step in range(300):
        what = chance.choice(["write", "round", "send", "ack", "ack", "lose"] if step % 40 else ["lose"])
        if what == "write":
            chunk = chance.randrange(count)
            newest[chunk] += 1
            dirty.add(chunk)
        elif what == "round":
            started(planner, chunks_of(*sorted(dirty)))
            dirty = set()
        elif what == "send" and (batch := planner.take_batch(chance.randint(1, 6) * CHUNK)) is not None:
            planner.launched(batch, len(batch.chunks), 1)
            wire += [(int(chunk), newest[chunk]) for chunk in batch.chunks]
        elif what == "ack" and wire:
            taken = chance.randint(1, len(wire))
            for chunk, version in wire[:taken]:
                at_target[chunk] = max(at_target[chunk], version)
            wire = wire[taken:]
            planner.landed(taken)
        elif what == "lose":
            wire.clear()
            planner.link_lost()
            planner.set_order(Order.COLDEST_FIRST, no_heat)
        missing = set(planner.missing(0).tolist()) | dirty
        lacking = {chunk for chunk in range(count) if at_target[chunk] < newest[chunk]}
        assert lacking <= missing, f"seed {seed}, step {step}"
    started(planner, chunks_of(*sorted(dirty)))
    planner.link_lost()
    planner.set_order(Order.COLDEST_FIRST, no_heat)
    planner.landed(len(take_all(planner)))
    assert planner.is_settled
    assert planner.missing(0).tolist() == []


def test_quantised_heat_keeps_its_order():
    """More heat never ranks lower, and comes back to within a few percent."""
    heat = np.array([0, 0.01, 0.5, 1, 7, 8, 1000, 60000, 1e30], dtype=np.float32)
    ranks = quantise(heat)
    assert ranks.tolist() == sorted(ranks.tolist())
    assert ranks[0] == 0
    assert ranks[-1] == 255
    np.testing.assert_allclose(dequantise(ranks)[2:8], heat[2:8], rtol=0.07)
