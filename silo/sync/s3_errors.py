"""What an S3 server's refusals mean, whichever client heard them.

Our messages hold the status and the server's error code, nothing else of what was sent or received: an answer to
a wrong signature repeats the headers of the request, session token included. For the same reason a store
raises what it gets from here ``from None``. This module is pure.
"""

from __future__ import annotations

from silo.errors import CapacityError, InvalidRequestError, SiloError, UnavailableError

__all__ = ["CONFLICT", "NOT_FOUND", "NO_SUCH_BUCKET", "PRECONDITION_FAILED", "no_answer", "refusal"]

NOT_FOUND = 404
CONFLICT = 409
PRECONDITION_FAILED = 412
NO_SUCH_BUCKET = "NoSuchBucket"
"""The code that tells a missing bucket, which is a mistake, from a missing object, which is an answer."""

_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_TRY_AGAIN = frozenset(
    {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "ExpiredToken", "TooManyRequests"}
)
"""Codes that come with a status of 4xx, but pass: an expired token is renewed by its provider."""
_HINTS = {
    400: "see the server's error code",
    401: "are the credentials right?",
    403: "are the credentials right, and do they allow reading, writing, listing and deleting in this bucket?",
    404: "does the bucket exist?",
    416: "the range starts at or past the end of the object",
    501: "this server cannot do what Silo needs",
}


def refusal(status: int, code: str, what: str) -> SiloError:
    """The error for an answer that is not a success. ``what`` names the operation: "put head"."""
    message = f"the S3 server refused to {what}: {status}{f' {code}' if code else ''}"
    if code in _FULL or status == 507:
        return CapacityError(message, hint="make room in the bucket, or raise its quota")
    if code in _TRY_AGAIN or status in (CONFLICT, 408, 425, 429) or (status >= 500 and status != 501):
        return UnavailableError(message)
    if 300 <= status < 400:
        return InvalidRequestError(message, hint="is the region right?")
    return InvalidRequestError(message, hint=_HINTS.get(status, ""))


def no_answer(what: str, why: str) -> UnavailableError:
    """The error for a request that brought no answer, or only a part of one."""
    return UnavailableError(f"the S3 server did not {what}: {why}")
