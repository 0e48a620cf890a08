"""Certificates for the hosts of a test, made as `silo certs` makes them."""

from __future__ import annotations

from pathlib import Path

import attrs

from silo.clock import SystemClock
from silo.p2p.tls import HostTls
from silo.p2p.tls_authority import Authority

DAY_S = 86400.0


@attrs.frozen
class ShiftedClock(SystemClock):
    """The time of day is another one, for certificates of the past and the future."""

    shift_s: float

    def wall(self) -> float:
        return super().wall() + self.shift_s


class Fleet:
    """An authority in a directory. Hosts are dialled at 127.0.0.1 unless they are issued otherwise."""

    def __init__(self, directory: Path, *, shift_s: float = 0.0) -> None:
        self.authority = Authority(directory, ShiftedClock(shift_s))
        self.authority.make()

    def host(
        self,
        name: str,
        addresses: tuple[str, ...] = ("127.0.0.1",),
        *,
        days: int = 30,
        check_names: bool = True,
    ) -> HostTls:
        made = self.authority.issue(name, addresses, days=days)
        return HostTls.in_directory(made.directory, check_names=check_names)
