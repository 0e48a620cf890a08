"""The demo's plot, act by act. See the package for what it shows.

Every act either reaches its end or raises a `SiloError` that says what was seen; nothing is retried. The clock of
the report is that of this process, except for the downtime, which the source measures itself.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec

from silo.abc import Clock
from silo.control import Result
from silo.demo.guest import GuestPlan
from silo.demo.hosts import DaemonHost, GuestProcess
from silo.demo.image import DemoImage, build_image, check_image, missing_tools
from silo.errors import InvalidRequestError, SiloError, UnavailableError
from silo.threads import run_to_completion

__all__ = ["DemoReport", "DemoSettings", "play"]

MIB = 1 << 20
HYDRATION_TIMEOUT_S = 120.0
COMPARE_STEP = 4 * MIB


@attrs.frozen
class DemoSettings:
    """How much, how long, and against which store (``None``: a directory beside the disks)."""

    used: int = 272 * MIB
    guest_file: int = 32 * MIB
    warm_up_s: float = 2.0
    store: str | None = None
    keep: Path | None = None


class DemoReport(msgspec.Struct):
    """What the closing table shows. Bytes are before compression; ``rpo_s`` is the worst that was seen."""

    verified: bool = False
    downtime_ms: float = 0.0
    evacuated_ms: float = 0.0
    hydrated_ms: float = 0.0
    bytes_peer: int = 0
    bytes_store: int = 0
    rpo_s: float = 0.0
    guest_ops: int = 0
    guest_read_max_ms: float = 0.0
    seed: int = 0


Tell = Callable[[str], None]
"""Told, in a few words, what is happening now."""


@attrs.define
class Stage:
    """What the acts share."""

    directory: Path
    settings: DemoSettings
    clock: Clock
    tell: Tell
    group: str
    report: DemoReport
    image: DemoImage
    model: Path
    source: DaemonHost
    target: DaemonHost
    guest: GuestProcess


async def play(settings: DemoSettings, clock: Clock, tell: Tell) -> DemoReport:
    """All acts. Leaves nothing behind unless ``settings.keep`` names a directory to keep it all in."""
    if missing := missing_tools():
        raise InvalidRequestError(
            f"the demo needs {', '.join(missing)}", hint="on Debian: apt-get install e2fsprogs"
        )
    async with _directory(settings) as directory:
        stage = await _set_up(directory, settings, clock, tell)
        async with stage.guest, stage.source:
            await _serve(stage)
            async with stage.target:
                await stage.target.wait_ready()
                await _move(stage)
                await _hydrate(stage)
                await _finish(stage)
        return stage.report


@contextlib.asynccontextmanager
async def _directory(settings: DemoSettings) -> AsyncIterator[Path]:
    if settings.keep is not None:
        settings.keep.mkdir(parents=True)
        yield settings.keep
        return
    path = Path(tempfile.mkdtemp(prefix="silo-demo-"))
    try:
        yield path
    finally:
        await run_to_completion(None, shutil.rmtree, path, True)


async def _set_up(directory: Path, settings: DemoSettings, clock: Clock, tell: Tell) -> Stage:
    tell("building a file system from files of this machine")
    host_a = directory / "a"
    seed = int.from_bytes(clock.token(4), "big")
    group = f"demo-{clock.token(4).hex()}"
    image = await run_to_completion(None, _build, directory, settings, clock.token(MIB))
    model = directory / "model.img"
    await run_to_completion(None, shutil.copyfile, image.path, model)
    control = directory / "guest.sock"
    plan = GuestPlan(model=str(model), control=str(control), writable=image.writable, seed=seed)
    store = settings.store or f"file://{directory}/store"
    # The guest reads everywhere, and all of the image would fit into the default: then the store had nothing to do.
    common = {"store": store, "sync": {"interval": "500ms"}, "migration": {"hot": "48M"}}
    source = DaemonHost(
        "the first host",
        host_a,
        {
            **common,
            "groups": {
                group: {"listen": [f"unix:{host_a}/nbd.sock"], "volumes": {"disk": {"path": str(image.path)}}}
            },
        },
        control,
    )
    host_b = directory / "b"
    target = DaemonHost(
        "the second host",
        host_b,
        {
            **common,
            "peer": f"unix:{host_b}/peer.sock",
            "listen": f"unix:{host_b}/nbd.sock",
            "incoming": {"directory": str(host_b / "disks")},
        },
        control,
    )
    report = DemoReport(seed=seed)
    guest = GuestProcess(directory, plan)
    return Stage(directory, settings, clock, tell, group, report, image, model, source, target, guest)


def _build(directory: Path, settings: DemoSettings, content: bytes) -> DemoImage:
    return build_image(directory, used=settings.used, guest_file=settings.guest_file, content=content)


async def _group_status(stage: Stage, host: DaemonHost) -> dict[str, Any]:
    groups = (await host.call("status"))["groups"]
    found: list[dict[str, Any]] = [group for group in groups if group["name"] == stage.group]
    if not found:
        raise SiloError(f"{host.name} does not know the group", hint=host.last_words())
    return found[0]


async def _serve(stage: Stage) -> None:
    stage.tell("serving the disk to a guest that checks every read")
    await stage.guest.line()
    await stage.source.wait_ready()
    uri = (await _group_status(stage, stage.source))["volumes"][0]["uris"][0]
    if (answer := await stage.guest.say(f"resume {uri}")) != "ok":
        raise SiloError(f"the guest did not start: {answer}", hint=stage.guest.last_words())
    stage.tell("storing the first generation")
    await stage.source.call("sync", group=stage.group)
    until = stage.clock.monotonic() + stage.settings.warm_up_s
    while stage.clock.monotonic() < until:
        stage.tell("the guest works, the store follows")
        status = await _group_status(stage, stage.source)
        stage.report.rpo_s = max(stage.report.rpo_s, status["sync"]["rpo_s"] or 0.0)
        await stage.source.call("sync", group=stage.group)
        await stage.guest.stats()


async def _move(stage: Stage) -> None:
    stage.tell("moving to the second host")
    started = stage.clock.monotonic()
    peer = f"unix:{stage.target.directory}/peer.sock"
    async with stage.source.control() as daemon:
        lines = daemon.stream("migrate", group=stage.group, to=peer, deadline_s=60.0)
        try:
            async for line in lines:
                event = line.value if isinstance(line, Result) else line
                stage.tell(f"moving to the second host: {event.get('phase', event.get('event', ''))}")
                stage.report.downtime_ms = event.get("downtime_ms") or stage.report.downtime_ms
                stage.report.bytes_peer = max(stage.report.bytes_peer, event.get("bytes_peer") or 0)
                if isinstance(line, Result) or event.get("phase") == "evacuated":
                    stage.report.evacuated_ms = (stage.clock.monotonic() - started) * 1e3
                    break
            else:
                raise SiloError("the migration ended without evacuating", hint=stage.source.last_words())
        except UnavailableError as error:
            raise SiloError("the first host died", hint=stage.source.last_words()) from error
        stage.tell("killing the first host")
        await stage.source.end(signal.SIGKILL)


async def _hydrate(stage: Stage) -> None:
    started = stage.clock.monotonic()
    while stage.clock.monotonic() < started + HYDRATION_TIMEOUT_S:
        status = await _group_status(stage, stage.target)
        absent = sum(volume["absent_store"] + volume["absent_peer"] for volume in status["volumes"])
        stage.tell(f"the second host pulls the rest from the store: {absent // MIB} MiB to go")
        await stage.guest.stats()
        if status["hydrated"]:
            stage.report.hydrated_ms = (stage.clock.monotonic() - started) * 1e3
            stage.report.bytes_store = status["bytes_store"]
            return
        async with stage.target.control() as daemon:
            await daemon.call("wait", group=stage.group, timeout_s=0.25)
    raise SiloError(
        f"the rest did not arrive within {HYDRATION_TIMEOUT_S:.0f} s", hint=stage.target.last_words()
    )


async def _finish(stage: Stage) -> None:
    stage.tell("stopping the guest")
    stats = await stage.guest.stats("stop")
    stage.report.guest_ops = stats.ops
    stage.report.guest_read_max_ms = stats.read_max_ms
    await stage.guest.end(signal.SIGTERM)
    disk = stage.target.directory / "disks" / stage.group / "disk.img"
    if code := await stage.target.end(signal.SIGTERM):
        raise SiloError(f"the second host ended with {code}", hint=stage.target.last_words())
    stage.tell("comparing the whole disk with the model, and checking the file system")
    await run_to_completion(None, _compare, disk, stage.model)
    await run_to_completion(None, check_image, disk)
    stage.report.verified = True


def _compare(disk: Path, model: Path) -> None:
    """Byte by byte. `SiloError` with the offset of the first difference."""
    with disk.open("rb") as ours, model.open("rb") as theirs:
        offset = 0
        while True:
            found, expected = ours.read(COMPARE_STEP), theirs.read(COMPARE_STEP)
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
                raise SiloError(f"the disk differs from the model at byte {offset + at}")
            if not found:
                return
            offset += len(found)
