#!/usr/bin/env python3
"""Talk to QEMU: ``qmp.py SOCKET STEP...``, one step after the other, and fail with the first that fails.

A step is a QMP command in JSON; or ``@STATUS``, which waits for the migration to get there, and for that the
capability ``events`` must be on; or ``@over``, which waits until there is no migration (any more), however it ended:
a cancelled one goes on for a moment. Needs nothing but Python; whoever calls it brings the deadline.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any, TextIO

ENDS = ("completed", "cancelled", "failed")
POLL_S = 0.01


def read(monitor: TextIO) -> dict[str, Any]:
    """The next thing that QEMU says."""
    if not (line := monitor.readline()):
        sys.exit("QEMU has closed its monitor")
    message: dict[str, Any] = json.loads(line)
    return message


def status_of(message: dict[str, Any]) -> str:
    """The migration's status, if that is what the message tells."""
    return str(message["data"]["status"]) if message.get("event") == "MIGRATION" else ""


def ask(monitor: TextIO, command: str) -> tuple[Any, str]:
    """What a command returns, and the status that the migration came to meanwhile."""
    status = ""
    monitor.write(command + "\n")
    monitor.flush()
    while "return" not in (answer := read(monitor)):
        if "error" in answer:
            sys.exit(f"{json.loads(command)['execute']}: {answer['error']['desc']}")
        status = status_of(answer) or status
    return answer["return"], status


def wait_over(monitor: TextIO) -> None:
    """Return when no migration is going on."""
    while ask(monitor, '{"execute": "query-migrate"}')[0].get("status", "none") not in ("none", *ENDS):
        time.sleep(POLL_S)  # noqa: TID251 - a script of its own, without Silo


def main(path: str, *steps: str) -> None:
    """Do the steps."""
    status = ""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw", encoding="utf-8") as monitor:
            read(monitor)  # its greeting
            for step in ('{"execute": "qmp_capabilities"}', *steps):
                if step == "@over":
                    wait_over(monitor)
                elif step.startswith("@"):
                    while status != step[1:]:
                        if status in ENDS:
                            sys.exit(f"the migration of the memory is {status}, not {step[1:]}")
                        status = status_of(read(monitor)) or status
                else:
                    status = ask(monitor, step)[1] or status


if __name__ == "__main__":
    main(*sys.argv[1:])
