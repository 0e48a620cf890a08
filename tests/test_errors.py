"""The tree of errors: complete, documented, and usable by a caller who must decide what to do next."""

from __future__ import annotations

import errno
import inspect

import pytest

from silo import errors
from silo.errors import SiloError

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_every_class_is_exported():
    """``__all__`` is exactly the classes that the module defines, in order."""
    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert errors.__all__ == sorted(defined)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_belongs_to_the_tree(kind):
    """Catching SiloError catches all; each class says in words what it means and appears in the picture."""
    assert issubclass(kind, SiloError)
    assert kind.__doc__
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", CLASSES)
def test_message_and_hint(kind):
    """``str`` is the message and, if there is one, the hint; both can be had apart."""
    plain, hinted = kind("it broke"), kind("it broke", hint="mend it")
    assert str(plain) == "it broke"
    assert str(hinted) == "it broke (mend it)"
    assert (hinted.message, hinted.hint) == ("it broke", "mend it")


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (errors.InvalidRequestError, errno.EINVAL),
        (errors.ClosedError, errno.ESHUTDOWN),
        (errors.FencedError, errno.EIO),
        (errors.UnavailableError, errno.EIO),
        (errors.CorruptionError, errno.EIO),
        (errors.CapacityError, errno.ENOSPC),
        (errors.InvariantError, errno.EIO),
    ],
)
def test_errno_for_the_guest(kind, number):
    """What a guest sees of an error is a number that its kernel understands."""
    assert kind("x").errno == number


def test_only_what_may_pass_is_retryable():
    """Retrying helps when the world was away or when a migration was undone, and never otherwise."""
    retryable = {kind for kind in CLASSES if kind.retryable}
    assert retryable == {errors.UnavailableError, errors.MigrationAborted}


def test_invalid_requests_are_value_errors():
    """A caller who does not know Silo's errors still catches a wrong argument as what it is."""
    with pytest.raises(ValueError, match="wrong"):
        raise errors.InvalidRequestError("wrong")


def test_protocol_errors_have_a_side():
    """Both sides' mistakes are protocol errors, and neither is the other's."""
    assert issubclass(errors.LocalProtocolError, errors.ProtocolError)
    assert issubclass(errors.RemoteProtocolError, errors.ProtocolError)
    assert not issubclass(errors.LocalProtocolError, errors.RemoteProtocolError)
    assert not issubclass(errors.RemoteProtocolError, errors.LocalProtocolError)
