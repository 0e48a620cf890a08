"""moto's server with one request at a time: it looks at the condition of a write and writes in two steps, and
with two threads two writers of one object can both win, which is not what S3 does.

``python -m tests.support.moto_process [CERTIFICATE KEY]`` listens on a free port of the loopback and says which.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

# moto reads the environment when it is imported.
os.environ.setdefault("MOTO_PORT", "0")

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple


class OneAtATime:
    """A WSGI application that finishes an answer before it looks at the next request."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environment: dict[str, Any], start_response: Any) -> list[bytes]:
        with self._lock:
            return list(self._application(environment, start_response))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run_simple(
        os.environ.get("MOTO_HOST", "127.0.0.1"),
        0,
        OneAtATime(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        ssl_context=tuple(sys.argv[1:3]) if len(sys.argv) > 2 else None,
        request_handler=MotoRequestHandler,
    )
