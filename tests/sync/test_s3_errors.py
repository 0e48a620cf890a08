"""Statuses and codes of S3 servers, and what a caller may do about each."""

from __future__ import annotations

import pytest

from silo.errors import CapacityError, InvalidRequestError, SiloError, UnavailableError
from silo.sync.s3_errors import no_answer, refusal


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "InternalError", UnavailableError),
        (502, "", UnavailableError),
        (503, "SlowDown", UnavailableError),
        (504, "", UnavailableError),
        (429, "TooManyRequests", UnavailableError),
        (409, "ConditionalRequestConflict", UnavailableError),
        (409, "OperationAborted", UnavailableError),
        (408, "", UnavailableError),
        (400, "RequestTimeout", UnavailableError),
        (400, "ExpiredToken", UnavailableError),
        (400, "InvalidArgument", InvalidRequestError),
        (401, "", InvalidRequestError),
        (403, "SignatureDoesNotMatch", InvalidRequestError),
        (403, "AccessDenied", InvalidRequestError),
        (404, "NoSuchBucket", InvalidRequestError),
        (416, "InvalidRange", InvalidRequestError),
        (301, "PermanentRedirect", InvalidRequestError),
        (501, "NotImplemented", InvalidRequestError),
        (403, "QuotaExceeded", CapacityError),
        (507, "XMinioStorageFull", CapacityError),
    ],
)
def test_refusals(status: int, code: str, kind: type[SiloError]) -> None:
    error = refusal(status, code, "put vm1/head")
    assert type(error) is kind
    assert str(status) in str(error)
    assert code in str(error)
    assert "put vm1/head" in str(error)
    assert error.hint or kind is UnavailableError


def test_no_answer() -> None:
    error = no_answer("get a", "a part of it came")
    assert error.retryable
    assert "get a" in str(error)
