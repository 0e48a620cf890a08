"""Say one line to the demo's guest and print its answer: ``python -S say.py SOCKET suspend``.

A workload hook that must be quick: it imports nothing but the socket module.
"""

from __future__ import annotations

import socket
import sys


def say(path: str, line: str, timeout_s: float = 30.0) -> str:
    """The guest's answer to a line. ``OSError`` when there is no guest, or it does not answer in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
        guest.settimeout(timeout_s)
        guest.connect(path)
        guest.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = guest.recv(65536)
            if not part:
                break
            answer += part
    return answer.decode().strip()


if __name__ == "__main__":
    reply = say(sys.argv[1], " ".join(sys.argv[2:]))
    sys.stdout.write(reply + "\n")
    sys.exit(reply != "ok")
