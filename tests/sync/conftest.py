"""The S3 server of the tests in this directory, started when the first of them asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.support.s3 import S3Server, moto_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server that checks signatures."""
    with moto_server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """A new bucket on it."""
    return s3_server.make_bucket(f"bucket-{next(_numbers)}")
