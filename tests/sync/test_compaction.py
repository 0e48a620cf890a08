"""Which segments are emptied: the emptiest, as few as space demands, within the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from silo.sync.compaction import GAIN_MIN, LIVE_PART_MAX, SPACE_TARGET, Filling, choose_segments

MIB = 1 << 20
FILLINGS = st.dictionaries(
    st.text("abc", min_size=1, max_size=4),
    st.integers(1, 32 * MIB).flatmap(lambda size: st.builds(Filling, st.just(size), st.integers(0, size))),
    max_size=30,
)


def test_the_emptiest_go_first() -> None:
    """And no more of them than the target asks for."""
    fillings = {f"s{part}": Filling(10 * MIB, part * MIB) for part in range(1, 10)}
    assert choose_segments(fillings, budget=100 * MIB) == ["s1", "s2", "s3", "s4", "s5"]
    assert choose_segments(fillings, budget=3 * MIB) == ["s1", "s2"]
    assert choose_segments({"full": Filling(MIB, MIB)}, budget=MIB) == []


def test_small_segments_are_not_rewritten_for_ever() -> None:
    """Their names and footers are no waste that rewriting could remove."""
    fillings = {f"s{number}": Filling(500, 200) for number in range(50)}
    assert choose_segments(fillings, budget=MIB) == []


@given(FILLINGS, st.integers(0, 200 * MIB))
def test_what_is_chosen_is_worth_it(fillings: dict[str, Filling], budget: int) -> None:
    """Each has something to give; together they stay in the budget; and the target is met, or nothing more helps."""
    chosen = choose_segments(fillings, budget=budget)
    assert len(set(chosen)) == len(chosen)
    assert sum(fillings[key].live for key in chosen) <= budget
    for key in chosen:
        assert 0 < fillings[key].live <= LIVE_PART_MAX * fillings[key].size
        assert fillings[key].size - fillings[key].live > GAIN_MIN
    live = sum(filling.live for filling in fillings.values())
    size = sum(filling.size for filling in fillings.values() if filling.live)
    after = size - sum(fillings[key].size - fillings[key].live for key in chosen)
    if budget >= live:
        left = [filling for key, filling in fillings.items() if filling.live and key not in chosen]
        worth = [f for f in left if f.live <= LIVE_PART_MAX * f.size and f.size - f.live > GAIN_MIN]
        assert after <= SPACE_TARGET * live or not worth
