"""The base of all layers."""

from __future__ import annotations

import inspect

import pytest

from silo.abc import BlockDevice
from silo.devices.checked import CheckedDevice
from silo.devices.delayed import DelayedDevice
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.layer import Layer
from silo.devices.memory import MemoryDevice
from silo.devices.volatile import VolatileDevice
from silo.errors import SiloError
from silo.testing.check_device import check_device

VERBS = sorted(BlockDevice.__abstractmethods__)


class Passing(Layer):
    """A layer that says of every verb that it has nothing to add."""

    read_nowait = Layer.read_nowait
    write_nowait = Layer.write_nowait
    zero_nowait = Layer.zero_nowait
    read = Layer.read
    write = Layer.write
    zero = Layer.zero
    flush = Layer.flush
    data_extents = Layer.data_extents
    aclose = Layer.aclose


async def test_contract() -> None:
    async def make() -> Passing:
        return Passing(Passing(MemoryDevice(1 << 20)))

    await check_device(make)


def test_the_port_has_no_other_verbs() -> None:
    """Whoever adds a public method to the port adds it to the layers too."""
    public = [
        name for name, _ in inspect.getmembers(BlockDevice, inspect.isfunction) if not name.startswith("_")
    ]
    assert sorted(public) == sorted([*VERBS, "copy_nowait", "flush_nowait"])


async def test_what_the_port_derives_goes_through_the_layer() -> None:
    """`copy_nowait` is made of a verb, and `flush_nowait` declines, so that no layer can forget them."""
    device = FaultyDevice(MemoryDevice(1 << 20))
    device.fail(Verb.READ)
    with pytest.raises(SiloError):
        device.copy_nowait(0, memoryview(bytearray(512)))
    assert not device.flush_nowait()
    await device.aclose()


@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_that_forgets_a_verb_cannot_be_defined(verb: str) -> None:
    body = {name: getattr(Layer, name) for name in VERBS if name != verb}
    with pytest.raises(TypeError, match=f"does not say what it does on {verb}"):
        type("Forgetful", (Layer,), body)


@pytest.mark.parametrize("layer", [CheckedDevice, DelayedDevice, FaultyDevice, VolatileDevice])
def test_every_layer_of_ours_names_every_verb(layer: type[Layer]) -> None:
    assert [verb for verb in VERBS if verb not in vars(layer)] == []


def test_a_layer_may_refine_one_that_named_everything() -> None:
    class Quiet(CheckedDevice):
        async def flush(self) -> None:
            """Says so of one verb, and leaves the others as they were named."""

    assert Quiet(MemoryDevice(512)).size == 512


def test_a_layer_says_what_it_is_around() -> None:
    assert repr(Passing(CheckedDevice(MemoryDevice(512)))) == "Passing(CheckedDevice(MemoryDevice(512)))"
