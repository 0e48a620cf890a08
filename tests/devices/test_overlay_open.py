"""Overlays on disk: what is made, what is recognised, what is refused, and what a death in the middle leaves."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from silo.devices.checked import CheckedDevice
from silo.devices.file import FileDevice
from silo.devices.overlay_base import Base
from silo.devices.overlay_open import open_base, open_overlay, open_overlay_over
from silo.errors import CorruptionError, InvalidRequestError, UnavailableError
from silo.records import encode_record
from silo.testing.check_device import check_device
from tests.support.overlays import memory_with
from tests.support.source import ROOT
from tests.test_volumestate import Died, dying

MIB = 1 << 20
CELL = 65536
GOLDEN = random.Random(4).randbytes(3 * CELL + 512)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.img"
    path.write_bytes(GOLDEN)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.overlay"


async def written(path: Path, *bases: Path, **options: object) -> bytes:
    """Open (or make) an overlay, write a little, flush, close. Returns what it holds then."""
    async with contextlib.aclosing(await open_overlay(path, *bases, **options)) as overlay:
        await overlay.write(100, path.name.encode())
        await overlay.zero(CELL, CELL)
        await overlay.flush()
        return bytes(await overlay.read(0, overlay.size))


async def content_of(path: Path, *bases: Path, **options: object) -> bytes:
    async with contextlib.aclosing(await open_overlay(path, *bases, **options)) as overlay:
        return bytes(await overlay.read(0, overlay.size))


class Maker:
    """Makes overlays over an image, each in a folder of its own, and opens them again."""

    def __init__(self, directory: Path, *bases: Path) -> None:
        self.directory = directory
        self.bases = bases
        self.made: dict[int, Path] = {}

    async def make(self) -> CheckedDevice:
        return await self._open(self.directory / f"{len(self.made)}.overlay")

    async def reopen(self, device: CheckedDevice) -> CheckedDevice:
        return await self._open(self.made[id(device)])

    async def _open(self, path: Path) -> CheckedDevice:
        device = CheckedDevice(await open_overlay(path, *self.bases))
        self.made[id(device)] = path
        return device


async def test_contract_over_a_file(tmp_path: Path) -> None:
    image = tmp_path / "empty.img"
    image.touch()
    os.truncate(image, 3 * MIB + 512)
    maker = Maker(tmp_path, image)
    await check_device(maker.make, reopen=maker.reopen)


async def test_contract_over_another_overlay(tmp_path: Path) -> None:
    image = tmp_path / "ones.img"
    image.write_bytes(b"\1" * MIB)
    async with contextlib.aclosing(await open_overlay(tmp_path / "zeros", image)) as middle:
        await middle.zero(0, middle.size)
        await middle.flush()
    maker = Maker(tmp_path, tmp_path / "zeros", image)
    await check_device(maker.make, reopen=maker.reopen)


# ---- making and opening again ---------------------------------------------------------------------------


@pytest.mark.parametrize("boot", [None, "another boot"])
async def test_what_was_written_is_there_again(path: Path, golden: Path, boot: str | None) -> None:
    content = await written(path, golden)
    assert content[100:112] == b"disk.overlay"
    assert await content_of(path, golden, boot=boot) == content
    assert golden.read_bytes() == GOLDEN


async def test_an_overlay_may_be_larger_than_its_base_and_have_any_cells(path: Path, golden: Path) -> None:
    content = await written(path, golden, size=2 * MIB, cell_size=4096)
    assert len(content) == 2 * MIB
    assert await content_of(path, golden) == content
    assert await content_of(path, golden, size=2 * MIB, cell_size=4096) == content


async def test_only_what_was_written_takes_space(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "large.img"
    image.write_bytes(b"x" * (8 * MIB))
    await written(path, image)
    assert (path / "data").stat().st_blocks * 512 <= CELL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": CELL}, "cannot lie over a base of 197120 bytes"),
        ({"cell_size": 1000}, "chunk size 1000 is not usable"),
        ({"cell_size": 2048}, "chunk size 2048 is not usable"),
        ({"size": 3 * CELL + 513}, "size 197121 is not usable"),
        ({"digest": "0" * 64}, f"is [0-9a-f]{{64}}, not {'0' * 64}"),
    ],
)
async def test_an_impossible_overlay_is_refused_before_anything_is_made(
    path: Path, golden: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await open_overlay(path, golden, **options)
    assert not path.exists()
    await FileDevice(golden).aclose()  # nobody holds it any more


@pytest.mark.parametrize("options", [{"size": MIB}, {"cell_size": 4096}])
async def test_an_overlay_stays_as_it_was_made(path: Path, golden: Path, options: dict[str, int]) -> None:
    await written(path, golden)
    with pytest.raises(InvalidRequestError, match="was made with 197120 bytes in cells of 65536, not with"):
        await open_overlay(path, golden, **options)


async def test_an_overlay_without_a_base_is_refused(path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="needs a base"):
        await open_overlay(path)


# ---- whose base it is -----------------------------------------------------------------------------------


async def test_another_base_is_refused_and_both_are_named(path: Path, golden: Path, tmp_path: Path) -> None:
    await written(path, golden)
    other = tmp_path / "other.img"
    other.write_bytes(b"X" + GOLDEN[1:])
    bases = [await open_base(golden), await open_base(other)]
    for base in bases:
        await base.device.aclose()
    message = f"lies over the base {bases[0].digest}, and the one given is {bases[1].digest}"
    with pytest.raises(InvalidRequestError, match=message):
        await open_overlay(path, other)
    await content_of(path, golden)


async def test_a_base_that_was_changed_is_refused_until_it_is_restored(path: Path, golden: Path) -> None:
    """The record beside it does not help it: it speaks of the file as it was."""
    content = await written(path, golden)
    with golden.open("r+b") as file:
        file.seek(1000)
        file.write(b"!")
    os.utime(golden, ns=(7, 7))
    with pytest.raises(InvalidRequestError, match="lies over the base"):
        await open_overlay(path, golden)
    with golden.open("r+b") as file:
        file.write(GOLDEN)
    os.utime(golden, ns=(8, 8))
    assert await content_of(path, golden) == content


async def test_the_same_bytes_elsewhere_are_the_same_base(path: Path, golden: Path, tmp_path: Path) -> None:
    content = await written(path, golden)
    golden.rename(tmp_path / "moved.img")
    assert await content_of(path, tmp_path / "moved.img") == content
    shutil.copy(tmp_path / "moved.img", tmp_path / "copied.img")
    assert await content_of(path, tmp_path / "copied.img") == content


async def test_a_known_digest_can_be_asked_for(path: Path, golden: Path) -> None:
    digest = (await Base.of(memory_with(GOLDEN))).digest
    await written(path, golden, digest=digest)
    with pytest.raises(InvalidRequestError, match="give the right image"):
        await open_overlay(path, golden, digest="f" * 64)


async def test_an_image_is_read_once_for_all(
    path: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await written(path, golden)

    async def read(device: object) -> str:
        raise AssertionError("it was read again")

    monkeypatch.setattr("silo.devices.overlay_base.content_digest", read)
    await content_of(path, golden)
    await written(tmp_path / "second", golden)
    await written(tmp_path / "third", golden, boot="another boot")


async def test_beside_a_base_that_cannot_be_written_to(
    path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlay itself remembers, from the second time on."""
    golden.with_name("golden.img.silo-digest").mkdir()  # stands for a folder of somebody else
    await written(path, golden)
    await content_of(path, golden)
    assert (path / "base.digest").is_file()
    monkeypatch.delattr("silo.devices.overlay_base.content_digest")
    await content_of(path, golden)


async def test_over_any_other_device(path: Path) -> None:
    for expected in (GOLDEN, b"x" + GOLDEN[1:]):
        base = await Base.of(memory_with(GOLDEN))
        async with contextlib.aclosing(await open_overlay_over(path, base)) as overlay:
            assert bytes(await overlay.read(0, overlay.size)) == expected
            await overlay.write(0, b"x")
            await overlay.flush()


# ---- sharing --------------------------------------------------------------------------------------------


async def test_many_overlays_over_one_base_at_once(golden: Path, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        overlays = []
        for number in range(4):
            overlay = await open_overlay(tmp_path / f"{number}.overlay", golden)
            overlays.append(await stack.enter_async_context(contextlib.aclosing(overlay)))
        for number, overlay in enumerate(overlays):
            await overlay.write(number * 1000, b"mine")
        for number, overlay in enumerate(overlays):
            at = number * 1000
            assert await overlay.read(0, overlay.size) == GOLDEN[:at] + b"mine" + GOLDEN[at + 4 :]
        with pytest.raises(UnavailableError, match=r"golden.img is in use"):
            FileDevice(golden)
        code = f"""
import asyncio
from silo.devices.overlay_open import open_overlay
async def main():
    overlay = await open_overlay({str(tmp_path / "child")!r}, {str(golden)!r})
    print((await overlay.read(0, 8)).hex())
    await overlay.aclose()
    await open_overlay({str(tmp_path / "0.overlay")!r}, {str(golden)!r})
asyncio.run(main())
"""
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert child.stdout == f"{GOLDEN[:8].hex()}\n"
        assert f"0.overlay/data is in use by process {os.getpid()}" in child.stderr
    await FileDevice(golden).aclose()


async def test_a_base_in_use_for_writing_is_refused(path: Path, golden: Path) -> None:
    async with contextlib.aclosing(FileDevice(golden)):
        with pytest.raises(UnavailableError, match=r"golden.img is in use"):
            await open_overlay(path, golden)
    await written(path, golden)


# ---- stacks ---------------------------------------------------------------------------------------------


async def test_a_stack(golden: Path, tmp_path: Path) -> None:
    """Two overlays over an overlay over an image: what is below is open for many, and for writing to nobody."""
    middle = await written(tmp_path / "middle", golden)
    one = await open_overlay(tmp_path / "one", tmp_path / "middle", golden)
    two = await open_overlay(tmp_path / "two", tmp_path / "middle", golden, size=MIB)
    async with contextlib.aclosing(one), contextlib.aclosing(two):
        assert await one.read(0, one.size) == middle
        assert bytes(await two.read(0, two.size)) == middle + bytes(MIB - len(middle))
        await one.write(CELL + 5, b"one")
        assert bytes(await one.read(CELL, 10)) == bytes(5) + b"one" + bytes(2)
        assert bytes(await two.read(CELL, 10)) == bytes(10)
        assert bytes(await two.read(2 * CELL, CELL)) == GOLDEN[2 * CELL : 3 * CELL]
        with pytest.raises(UnavailableError, match="middle/data is in use"):
            await open_overlay(tmp_path / "middle", golden)


async def test_a_base_that_is_an_overlay_can_only_be_read(golden: Path, tmp_path: Path) -> None:
    await written(tmp_path / "middle", golden)
    base = await open_base(tmp_path / "middle", golden)
    async with contextlib.aclosing(base.device) as device:
        for offset in (100, 2 * CELL, CELL):
            with pytest.raises(InvalidRequestError, match="can only be read"):
                device.write_nowait(offset, b"x")
            with pytest.raises(InvalidRequestError, match="can only be read"):
                await device.zero(offset, CELL)
    assert not (tmp_path / "middle" / "base.digest").exists()
    assert (tmp_path / "middle.silo-digest").exists()


@pytest.mark.parametrize("what", ["data", "map"])
async def test_a_lower_overlay_that_was_changed_is_refused(golden: Path, tmp_path: Path, what: str) -> None:
    await written(tmp_path / "middle", golden)
    await written(tmp_path / "upper", tmp_path / "middle", golden)
    async with contextlib.aclosing(await open_overlay(tmp_path / "middle", golden)) as middle:
        if what == "data":
            await middle.write(100, b"something else")
        else:
            await middle.zero(2 * CELL, CELL)
        await middle.flush()
    if what == "data":
        os.utime(tmp_path / "middle" / "data", ns=(9, 9))
    with pytest.raises(InvalidRequestError, match="upper lies over the base"):
        await open_overlay(tmp_path / "upper", tmp_path / "middle", golden)


async def test_a_lower_overlay_over_another_base_is_refused(golden: Path, tmp_path: Path) -> None:
    await written(tmp_path / "middle", golden)
    await written(tmp_path / "upper", tmp_path / "middle", golden)
    other = tmp_path / "other.img"
    other.write_bytes(b"X" + GOLDEN[1:])
    with pytest.raises(InvalidRequestError, match="middle lies over the base"):
        await open_overlay(tmp_path / "upper", tmp_path / "middle", other)


async def test_a_base_that_was_not_flushed_is_refused(golden: Path, tmp_path: Path) -> None:
    """What it shows could vanish with the power, and everything over it with that."""
    middle = tmp_path / "middle"
    async with contextlib.aclosing(await open_overlay(middle, golden)) as overlay:
        await overlay.write(0, b"not flushed")
    with pytest.raises(
        InvalidRequestError, match=r"was made durable \(open it for writing once, and flush\)"
    ):
        await open_overlay(tmp_path / "upper", middle, golden)
    async with contextlib.aclosing(await open_overlay(middle, golden)) as overlay:
        await overlay.flush()
    async with contextlib.aclosing(await open_overlay(tmp_path / "upper", middle, golden)) as upper:
        assert bytes(await upper.read(0, 11)) == b"not flushed"


async def test_what_is_no_overlay_is_refused_as_one(path: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (golden, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InvalidRequestError, match="data does not exist"):
            await open_overlay(path, wrong, golden)
    with pytest.raises(InvalidRequestError, match="neither a regular file"):
        await open_overlay(path, tmp_path / "empty")


# ---- damage and death -----------------------------------------------------------------------------------


async def test_missing_parts_are_damage(path: Path, golden: Path) -> None:
    await written(path, golden)
    for part in ("data", "map", "overlay"):
        (path / part).rename(path.with_name("elsewhere"))
        with pytest.raises(CorruptionError):
            await open_overlay(path, golden)
        assert not (path / part).exists(), "nothing is made in its place"
        path.with_name("elsewhere").rename(path / part)
    assert (await content_of(path, golden))[100:112] == b"disk.overlay"


async def test_data_of_another_length_is_damage(path: Path, golden: Path) -> None:
    await written(path, golden)
    for length in (0, CELL, MIB):
        os.truncate(path / "data", length)
        with pytest.raises(
            CorruptionError, match=r"data (is missing or empty|has \d+ bytes instead of 197120)"
        ):
            await open_overlay(path, golden)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"rust", "does not begin as a record"),
        (encode_record("overlay", b"{}"), "makes no sense"),
        (encode_record("overlay", b'{"size":1,"cell_size":4096,"base":"","format":1}'), "makes no sense"),
        (encode_record("overlay", b'{"size":4096,"cell_size":4096,"base":"","format":2}'), "newer version"),
    ],
)
async def test_a_damaged_record_is_said(path: Path, golden: Path, record: bytes, message: str) -> None:
    await written(path, golden)
    (path / "overlay").write_bytes(record)
    with pytest.raises(CorruptionError, match=message):
        await open_overlay(path, golden)


async def test_the_map_of_an_overlay_over_another_base_is_refused(
    path: Path, golden: Path, tmp_path: Path
) -> None:
    await written(path, golden)
    other = tmp_path / "other.img"
    other.write_bytes(b"X" + GOLDEN[1:])
    await written(tmp_path / "second", other)
    shutil.rmtree(path / "map")
    shutil.copytree(tmp_path / "second" / "map", path / "map")
    with pytest.raises(CorruptionError, match="belongs to another volume"):
        await open_overlay(path, golden)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the dead close nothing
@pytest.mark.parametrize("size", [None, MIB])
async def test_dying_anywhere_while_an_overlay_is_made_leaves_nothing_or_all(
    tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """Fail the first system call, then the second, and so on; what is left is finished or made anew, larger too."""
    await (await open_base(golden)).device.aclose()
    sizes = set()
    for nth in range(1, 200):
        path = tmp_path / f"{nth}.overlay"
        with monkeypatch.context() as patch:
            died = dying(patch, nth)
            with contextlib.suppress(Died):
                overlay = await open_overlay(path, golden, boot="one")
                await overlay.aclose()
        whole = (path / "overlay").exists()
        async with contextlib.aclosing(
            await open_overlay(path, golden, boot="two", size=None if whole else size)
        ) as overlay:
            assert bytes(await overlay.read(0, len(GOLDEN))) == GOLDEN
            await overlay.write(0, b"x")
            sizes.add(overlay.size)
        if not died():
            break
    assert not died()
    assert nth > 20
    assert sizes == {len(GOLDEN), size or len(GOLDEN)}


async def test_a_place_that_is_taken_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"golden.img is a file \(an overlay is a folder"):
        await open_overlay(golden, golden)
    home = tmp_path / "home"
    home.mkdir()
    (home / "notes.txt").touch()
    with pytest.raises(InvalidRequestError, match=r"home is no overlay: it holds notes\.txt"):
        await open_overlay(home, golden)
    assert [entry.name for entry in home.iterdir()] == ["notes.txt"]
    assert golden.read_bytes() == GOLDEN


async def test_another_process_that_is_making_it_is_left_alone(path: Path, golden: Path) -> None:
    path.mkdir()
    async with contextlib.aclosing(FileDevice(path / "data", MIB)):
        with pytest.raises(UnavailableError, match="data is in use by this very process"):
            await open_overlay(path, golden)
    assert (path / "data").stat().st_size == MIB


@pytest.mark.parametrize("what", ["process", "machine"])
async def test_a_reopened_overlay_has_what_it_promised(path: Path, golden: Path, what: str) -> None:
    """The process leaves everything; the machine leaves what was flushed."""
    overlay = await open_overlay(path, golden, boot="one")
    await overlay.write(10, b"flushed")
    await overlay.flush()
    await overlay.write(CELL, b"only written")
    assert overlay.zero_nowait(2 * CELL, CELL)
    await overlay.aclose()
    expected = bytearray(GOLDEN)
    expected[10:17] = b"flushed"
    if what == "process":
        expected[CELL : CELL + 12] = b"only written"
        expected[2 * CELL : 3 * CELL] = bytes(CELL)
    boot = "one" if what == "process" else "two"
    assert await content_of(path, golden, boot=boot) == expected
