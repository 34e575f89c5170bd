"""A session behind a server in a thread, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tinyllama.explorer.server import application, listen
from tinyllama.explorer.session import Session

SECRET = "the-secret"


@contextmanager
def served(session: Session) -> Iterator[int]:
    """Serve it; yields the port."""
    listener = listen(0)
    port = listener.getsockname()[1]
    app = application(session, SECRET, f"127.0.0.1:{port}")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()
