"""The numbers and headers of the protocol, and what errors become on the wire."""

from __future__ import annotations

import errno

import pytest

from silo.errors import (
    CapacityError,
    ClosedError,
    CorruptionError,
    FencedError,
    InvalidRequestError,
    InvariantError,
    SiloError,
    UnavailableError,
)
from silo.exports.nbd_wire import (
    EXTENDED_REPLY,
    EXTENDED_REQUEST,
    GREETING,
    INIT_MAGIC,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    NbdError,
    error_from_code,
    error_to_code,
)


def test_headers_have_the_sizes_of_the_protocol():
    """Every fixed-size header is as long as the protocol says."""
    sizes = [
        header.size
        for header in (
            GREETING,
            OPTION,
            OPTION_REPLY,
            REQUEST,
            EXTENDED_REQUEST,
            SIMPLE_REPLY,
            STRUCTURED_REPLY,
            EXTENDED_REPLY,
        )
    ]
    assert sizes == [18, 16, 20, 28, 32, 16, 20, 32]


def test_the_greeting_is_readable_text():
    """The two magic numbers of the greeting are what the protocol spells out in letters."""
    assert GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3) == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("x"), NbdError.EINVAL),
        (ClosedError("x"), NbdError.ESHUTDOWN),
        (CapacityError("x"), NbdError.ENOSPC),
        (FencedError("x"), NbdError.EIO),
        (UnavailableError("x"), NbdError.EIO),
        (CorruptionError("x"), NbdError.EIO),
        (InvariantError("x"), NbdError.EIO),
        (OSError(errno.EDQUOT, "x"), NbdError.ENOSPC),
        (OSError(errno.EFBIG, "x"), NbdError.ENOSPC),
        (OSError(errno.EROFS, "x"), NbdError.EPERM),
        (OSError(errno.ENOMEM, "x"), NbdError.EIO),
        (OSError("no number"), NbdError.EIO),
        (RuntimeError("x"), NbdError.EIO),
    ],
)
def test_errors_become_codes_that_may_travel(error: Exception, code: NbdError):
    """An error travels as the code that lets a client do the right thing, and as EIO when there is no better."""
    assert error_to_code(error) is code


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (NbdError.EIO, UnavailableError),
        (NbdError.ENOMEM, UnavailableError),
        (NbdError.ENOSPC, CapacityError),
        (NbdError.ESHUTDOWN, ClosedError),
        (NbdError.EPERM, InvalidRequestError),
        (NbdError.EINVAL, InvalidRequestError),
        (9999, InvalidRequestError),
    ],
)
def test_codes_become_errors_of_ours(code: int, kind: type[SiloError]):
    """A client raises what its caller would act upon; an unknown code counts as EINVAL."""
    assert type(error_from_code(code, "read of 1 byte")) is kind
