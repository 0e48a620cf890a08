"""Where master keys come from: a file, or what a command prints. Never a configuration, a URL or the environment.

A command is for keys that are kept elsewhere (a vault, a KMS, a TPM): it runs in a shell, once per start, and what it
writes to standard output is taken as the file would be. Its output appears in no log and no error.
"""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

from silo.errors import InvalidRequestError
from silo.sync.cipher import KeyRing, parse_keys

__all__ = ["load_keys"]

COMMAND_TIMEOUT_S = 60.0
SIZE_MAX = 64 * 1024


def load_keys(file: str = "", command: str = "") -> KeyRing | None:
    """The keys in ``file``, or those that ``command`` prints; ``None`` when neither is given. Blocks.

    `InvalidRequestError` when they cannot be had, when there is no key, or when others may read the file.
    """
    if file and command:
        raise InvalidRequestError("master keys come from a file or from a command, not from both")
    if file:
        return parse_keys(_read(Path(file)), file)
    if command:
        return parse_keys(_run(command), "the output of the key command")
    return None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            mode = stat.S_IMODE(path.stat().st_mode)
            data = opened.read(SIZE_MAX)
    except OSError as error:
        raise InvalidRequestError(f"cannot read the keys in {path}: {error.strerror}") from error
    if mode & stat.S_IRWXO:
        raise InvalidRequestError(f"everybody may read the keys in {path}", hint=f"chmod 600 {path}")
    return _text(data, str(path))


def _run(command: str) -> str:
    try:
        done = subprocess.run(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InvalidRequestError(f"the key command did not end within {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise InvalidRequestError(
            f"the key command ended with status {done.returncode}" + (f": {said[-1][:200]}" if said else "")
        )
    return _text(done.stdout[:SIZE_MAX], "the output of the key command")


def _text(data: bytes, origin: str) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise InvalidRequestError(
            f"{origin} is not text", hint="one key per line, in hexadecimal or base64"
        ) from None
