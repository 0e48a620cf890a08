"""One of the two hosts of a migration, as a process of its own. It takes commands from stdin and answers on stdout,
in JSON lines.

Source: prepares the disk and says ``ready``; told the URL of the other, it moves the disk there, says ``evacuated``
and, when the migration has ended, ``report``. Target: says where it listens, accepts one group, says ``hydrated``, and
compares every byte with what must be there. Both live until stdin ends, so that their CPU time can be read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import silo
from benchmarks.migration.scenario import (
    BLOCK,
    CHUNK,
    Scenario,
    block_content,
    chunk_content,
    chunks_of_blocks,
    used_blocks,
)
from silo.errors import CorruptionError, InvalidRequestError, SiloError
from silo.events import Phase, PhaseEntered
from silo.threads import run_to_completion

GROUP, VOLUME = "bench", "disk"
SOURCE_FILES, TARGET_FILES = "source-tls", "target-tls"
"""Where the parent puts their certificates, if there are any."""
LAZY = silo.SyncSettings(rpo_s=3600.0)
"""No cut comes by itself: what is unsynced stays so."""


class Rewriter:
    """A guest at the source that writes whole chunks again, one after the other, until it is stopped."""

    def __init__(self, scenario: Scenario, volume: silo.Volume) -> None:
        self.versions: dict[int, int] = {}
        """The version of each chunk that was written again, by its number."""
        self.writes = 0
        self._scenario = scenario
        self._volume = volume
        self._chunks = list(chunks_of_blocks(used_blocks(scenario)))

    async def write(self) -> None:
        """Write the next chunk; the walk strides over the disk, so that neighbours are not written together."""
        chunk = self._chunks[self.writes * 7919 % len(self._chunks)]
        version = self.versions.get(chunk, 0) + 1
        await self._volume.write(chunk * CHUNK, chunk_content(self._scenario, chunk, version))
        self.versions[chunk] = version
        self.writes += 1

    async def run(self) -> None:
        """Write at the scenario's rate until the group is gone."""
        with contextlib.suppress(SiloError):  # the group has moved
            while True:
                await self.write()
                await asyncio.sleep(1 / self._scenario.rewrites_per_s)


async def run_source(scenario: Scenario, directory: Path) -> None:
    """See the module."""
    async with silo.Host(directory / "source", **_between_hosts(scenario, directory / SOURCE_FILES)) as host:
        device = _device(scenario, directory / "source.img")
        group = await host.open_group(GROUP, {VOLUME: device}, store=_store(scenario, directory), sync=LAZY)
        volume, blocks = group.volumes[VOLUME], used_blocks(scenario)
        first_unsynced = scenario.synced // BLOCK
        for offset in blocks[:first_unsynced]:
            await volume.write(offset, block_content(scenario, offset))
        if scenario.synced:
            await group.sync_now()
        for offset in blocks[first_unsynced:]:
            await volume.write(offset, block_content(scenario, offset))
        rewriter = Rewriter(scenario, volume)
        for _ in range(scenario.dirty_chunks):
            await rewriter.write()
        say("ready")
        command = await hear()
        async with asyncio.TaskGroup() as tasks:
            guest = tasks.create_task(rewriter.run()) if scenario.rewrites_per_s else None
            async with group.migrate(command["to"]) as move:
                async for event in move.events():
                    if isinstance(event, PhaseEntered) and event.phase is Phase.EVACUATED:
                        say("evacuated")
                report = await move.wait_released()
            if guest is not None:
                guest.cancel()
        say("report", report=report.as_dict(), writes=rewriter.writes, versions=rewriter.versions)
        await hear()


async def run_target(scenario: Scenario, directory: Path) -> None:
    """See the module."""
    security = _between_hosts(scenario, directory / TARGET_FILES)
    async with silo.Host(directory / "target", listen="tcp:127.0.0.1:0", **security) as host:
        say("listening", url=host.peer_url)
        async for offer in host.offers():
            device = _device(scenario, directory / "target.img")
            group = await offer.accept({VOLUME: device}, store=_store(scenario, directory), sync=LAZY)
            await group.wait_hydrated()
            say("hydrated", bytes_store=group.status()["bytes_store"])
            await _verify(scenario, group.volumes[VOLUME], (await hear())["versions"])
            say("verified")
            await hear()
            return


async def _verify(scenario: Scenario, volume: silo.Volume, versions: Mapping[str, int]) -> None:
    """`CorruptionError` unless the disk holds exactly what was written at the source; the rest must be zeros."""
    expected = {offset: bytearray(block_content(scenario, offset)) for offset in used_blocks(scenario)}
    for key, version in versions.items():
        block, start = divmod(int(key) * CHUNK, BLOCK)
        expected[block * BLOCK][start : start + CHUNK] = chunk_content(scenario, int(key), version)
    zeros = bytes(BLOCK)
    for offset in range(0, scenario.size, BLOCK):
        if bytes(await volume.read(offset, BLOCK)) != expected.get(offset, zeros):
            raise CorruptionError(f"the block at {offset} is not what was written at the source")


def _between_hosts(scenario: Scenario, files: Path) -> dict[str, Any]:
    """How `silo.Host` is told to reach the other one."""
    if scenario.tls:
        return {"tls": silo.HostTls.in_directory(files)}
    return {"transport": silo.PlainTransport(insecure_tcp=True)}


def _device(scenario: Scenario, path: Path) -> silo.BlockDevice:
    return (
        silo.MemoryDevice(scenario.size)
        if scenario.medium == "memory"
        else silo.FileDevice(path, scenario.size)
    )


def _store(scenario: Scenario, directory: Path) -> str | None:
    return f"file://{directory / 'store'}" if scenario.store else None


def say(word: str, **values: Any) -> None:
    """One line to the parent."""
    print(json.dumps({"said": word, **values}), flush=True)


async def hear() -> dict[str, Any]:
    """The next line from the parent; an empty object when it is gone. No deadline: it lives longer than we do."""
    line = await run_to_completion(None, sys.stdin.readline)
    answer: dict[str, Any] = json.loads(line) if line else {}
    return answer


def main() -> None:
    """Be the host that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migration.host_child", description=__doc__)
    parser.add_argument("role", choices=("source", "target"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("scenario", type=Scenario.from_json)
    options = parser.parse_args()
    scenario: Scenario = options.scenario
    if scenario.synced and not scenario.store:
        raise InvalidRequestError("without a store nothing can be synced")
    run = run_source if options.role == "source" else run_target
    asyncio.run(run(scenario, options.directory))


if __name__ == "__main__":
    main()
