"""The probe: good stores pass, and each of the lies that servers tell is caught."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest

from silo.abc import Buffer, StoredObject
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, SiloError, UnavailableError
from silo.sync.memory_client import MemoryClient
from silo.sync.memory_store import MemoryStore
from silo.sync.probe import Probe, probe_store
from silo.sync.s3_location import EtagForm, S3Credentials
from silo.sync.store_faults import FaultKind, Verb
from silo.sync.store_url import open_store
from tests.support.s3 import S3Server


class Liar(MemoryClient):
    """A store of which single answers can be wrong."""

    def __init__(self, clock: SystemClock) -> None:
        super().__init__(MemoryStore(clock), "liar")


class CreatesTwice(Liar):
    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        return await (self.put(key, data) if match is None else super().put_if(key, data, match=match))


class MatchesAnything(Liar):
    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        return await (super().put_if(key, data, match=None) if match is None else self.put(key, data))


class MatchesAnythingReal(Liar):
    """Refuses only ETags that no object ever had: it compares with some cache."""

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        if match is not None and match != "0" * 32:
            return await self.put(key, data)
        return await super().put_if(key, data, match=match)


class MatchesNothing(Liar):
    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        return await super().put_if(key, data, match=None) if match is None else None


class IgnoresRanges(Liar):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        return await super().get(key)


class ForgetsTheSize(Liar):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        found = await super().get(key, start=start, length=length)
        return found and attrs.evolve(found, size=len(found.data))


class ReadsStale(Liar):
    first: StoredObject | None = None

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        self.first = self.first or await super().get(key)
        return self.first if length is None else await super().get(key, start=start, length=length)


class KnowsOneForm(Liar):
    """Compares ETags as the wire holds them, in one form only, like the gateways of Ceph."""

    etag_form = EtagForm.QUOTED
    knows: EtagForm | None = EtagForm.UNQUOTED
    parses_the_other = True

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        if match is not None and self.etag_form is not self.knows:
            if not self.parses_the_other:
                raise InvalidRequestError("400 Bad Request")
            return None
        return await super().put_if(key, data, match=match)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (CreatesTwice, "create only if absent"),
        (MatchesAnything, "was not the one"),
        (MatchesAnythingReal, "changed meanwhile"),
        (MatchesNothing, "ETag it had just named"),
        (IgnoresRanges, "the part"),
        (ForgetsTheSize, "the size"),
        (ReadsStale, "read back"),
    ],
)
async def test_liars_are_refused_and_tidied_up(clock: SystemClock, kind: type[Liar], message: str) -> None:
    liar = kind(clock)
    with pytest.raises(InvalidRequestError, match=message):
        await probe_store(liar, clock)
    assert liar.store.snapshot() == {}


async def test_a_good_store_passes_and_is_left_as_it_was(clock: SystemClock) -> None:
    store = MemoryStore(clock)
    store.place("vm/head", b"precious")
    assert await probe_store(store.client(), clock, prefix="vm/") == Probe(())
    assert store.snapshot() == {"vm/head": b"precious"}
    keys = {operation.key.rpartition("/")[0] for operation in store.log}
    assert keys == {"vm/probe"}


@pytest.mark.parametrize("form", EtagForm)
@pytest.mark.parametrize("parses", [True, False])
async def test_the_form_of_etags_is_found(clock: SystemClock, form: EtagForm, parses: bool) -> None:
    store = KnowsOneForm(clock)
    store.knows, store.parses_the_other = form, parses
    assert await probe_store(store, clock) == Probe((form,))
    assert store.etag_form is form


async def test_a_store_that_knows_no_form_is_refused(clock: SystemClock) -> None:
    store = KnowsOneForm(clock)
    store.knows = None
    with pytest.raises(InvalidRequestError, match="ETag it had just named"):
        await probe_store(store, clock)


async def test_an_outage_at_any_point_is_told_as_one(clock: SystemClock) -> None:
    count = len(await _log_of_a_probe(clock))
    assert count > 6
    for number in range(count):
        for kind in (FaultKind.FAIL, FaultKind.LOSE_RESPONSE):
            store = MemoryStore(clock)
            store.inject(kind, skip=number)
            with pytest.raises(UnavailableError):
                await probe_store(store.client(), clock)
            assert store.snapshot() == {} or number == count - 1


async def _log_of_a_probe(clock: SystemClock) -> list[Verb]:
    store = MemoryStore(clock)
    await probe_store(store.client(), clock)
    return [operation.verb for operation in store.log]


async def test_a_failed_cleaning_hides_no_error(clock: SystemClock) -> None:
    liar = CreatesTwice(clock)
    liar.store.inject(FaultKind.FAIL, Verb.DELETE)
    with pytest.raises(SiloError, match="create only if absent"):
        await probe_store(liar, clock)


@pytest.mark.parametrize("client", ["obstore", "aiobotocore"])
async def test_a_real_server(s3_server: S3Server, bucket: str, clock: SystemClock, client: str) -> None:
    credentials = S3Credentials(s3_server.access_key_id, s3_server.secret_access_key)
    store = open_store(s3_server.url(bucket, "prefix", client=client), clock, credentials=credentials)
    assert await probe_store(store, clock, prefix="vm/") == Probe((EtagForm.QUOTED, EtagForm.UNQUOTED))
    assert store.etag_form is EtagForm.QUOTED  # type: ignore[attr-defined]
    assert [info.key async for info in store.list("")] == []
    await store.aclose()
