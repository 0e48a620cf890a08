"""Rules: which operations they strike, and how often."""

from __future__ import annotations

from silo.sync.store_faults import Fault, FaultKind, Operation, Outcome, Rule, Verb


def operation(verb: Verb = Verb.PUT, *keys: str, client: str = "a") -> Operation:
    return Operation(0, client, verb, keys or ("vm/head",))


def test_a_rule_strikes_once_by_default() -> None:
    rule = Rule(Fault(FaultKind.FAIL))
    assert [rule.strikes(operation()) for _ in range(3)] == [True, False, False]
    assert rule.hits == 1


def test_a_rule_skips_and_then_strikes_so_often() -> None:
    rule = Rule(Fault(FaultKind.FAIL), skip=2, times=2)
    assert [rule.strikes(operation()) for _ in range(6)] == [False, False, True, True, False, False]
    for_ever = Rule(Fault(FaultKind.FAIL), times=None)
    assert all(for_ever.strikes(operation()) for _ in range(10))


def test_a_rule_counts_only_what_it_is_about() -> None:
    rule = Rule(Fault(FaultKind.FAIL), verbs=frozenset({Verb.PUT_IF}), key="*/head", client="b*", skip=1)
    others = [
        operation(Verb.PUT, client="b1"),
        operation(Verb.PUT_IF, "vm/segments/x", client="b1"),
        operation(Verb.PUT_IF, client="a"),
    ]
    assert not any(rule.strikes(other) for other in others * 3)
    assert [rule.strikes(operation(Verb.PUT_IF, client="b1")) for _ in range(3)] == [False, True, False]


def test_one_of_several_keys_is_enough() -> None:
    rule = Rule(Fault(FaultKind.FAIL), key="*/b", times=None)
    assert rule.strikes(operation(Verb.DELETE, "x/a", "x/b"))
    assert not rule.strikes(operation(Verb.DELETE, "x/a", "x/c"))
    assert Rule(Fault(FaultKind.FAIL)).strikes(Operation(0, "a", Verb.DELETE, ()))


def test_operations_know_what_they_are() -> None:
    assert {verb for verb in Verb if operation(verb).mutates} == {Verb.PUT, Verb.PUT_IF, Verb.DELETE}
    entry = operation(Verb.PUT_IF)
    entry.outcome = Outcome.LOST
    assert str(entry) == "#0 a put_if vm/head [lost]"
