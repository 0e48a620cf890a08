"""Warnings in the log: announced ones are wanted, all others fail the test."""

from __future__ import annotations

import logging
import re
from types import TracebackType
from typing import Self

import pytest

WATCHED = ("silo", "asyncio", "concurrent")
"""Loggers whose warnings count. Libraries below us may warn about things that are none of our business."""


class ExpectedLogs(logging.Handler):
    """Collects what the watched loggers say at WARNING and above while it is entered.

    Call it with a regular expression to announce a record: at least one record must match by the end of the
    test, and those that match are fine. The pattern is searched in the formatted message.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[logging.LogRecord] = []
        self._expected: list[re.Pattern[str]] = []
        self._allowed: list[re.Pattern[str]] = []

    def __call__(self, pattern: str) -> None:
        self._expected.append(re.compile(pattern))

    def allow(self, pattern: str) -> None:
        """Such a record is fine, and so is its absence: which of two comes first is not the test's to decide."""
        self._allowed.append(re.compile(pattern))

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in WATCHED:
            self.seen.append(record)

    def matching(self, pattern: str) -> list[str]:
        """The messages seen so far in which ``pattern`` is found."""
        return [message for record in self.seen if re.search(pattern, message := record.getMessage())]

    def check(self) -> None:
        """Fail the test unless what was announced and what was seen agree."""
        problems = [
            f"unexpected {record.levelname} of {record.name}: {record.getMessage()}"
            for record in self.seen
            if not any(pattern.search(record.getMessage()) for pattern in self._expected + self._allowed)
        ]
        problems += [
            f"expected in the log, but missing: {pattern.pattern}"
            for pattern in self._expected
            if not self.matching(pattern.pattern)
        ]
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)
