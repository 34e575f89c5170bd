"""A page for one session, served to this machine alone: `python scripts/explore.py`.

Whoever has the address has the page: it holds a random token, as Jupyter's does. Requests from other sites
are refused by Host and Origin, and the page may load nothing from elsewhere.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tinyllama.errors import InputError
from tinyllama.explorer.page import answers, page
from tinyllama.explorer.session import Session

LARGEST_REQUEST = 1 << 20


def application(session: Session, token: str, host: str) -> Starlette:
    """The web application.

    Args:
        session: what is explored.
        token: a secret that every request must have, in the path.
        host: the name and port under which the page is opened.
    """
    own = {f"http://{host}"}

    def allowed(request: Request) -> bool:
        origin = request.headers.get("origin")
        right = secrets.compare_digest(request.path_params["token"].encode(), token.encode())
        return right and request.headers.get("host") == host and (origin is None or origin in own)

    def guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if not allowed(request):
                return JSONResponse({"error": "not for you: open the address that explore printed"}, 403)
            try:
                response = await handle(request)
            except InputError as error:
                response = JSONResponse({"error": str(error)}, 400)
            response.headers.update({"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
            return response

        return checked

    async def whole_page(_request: Request) -> Response:
        return HTMLResponse(page({}), headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    async def saved(request: Request) -> Response:
        place = [request.query_params.get(name, "0") for name in ("layer", "head")]
        config = session.model.config
        limits = (config.num_hidden_layers, config.num_attention_heads)
        layer, head = (
            min(int(n), end - 1) if n.isdecimal() else 0 for n, end in zip(place, limits, strict=True)
        )
        text = page(await run_in_threadpool(answers, session, layer, head))
        return HTMLResponse(text, headers={"Content-Disposition": "attachment; filename=tinyllama.html"})

    async def view(request: Request) -> Response:
        name, query = request.path_params["name"], dict(request.query_params)
        return JSONResponse(await run_in_threadpool(session.view, name, query))

    async def act(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "cancel":
            session.cancel()
            return JSONResponse({})
        return JSONResponse(await run_in_threadpool(session.act, name, await _body(request)))

    async def progress(_request: Request) -> Response:
        return JSONResponse({"progress": session.progress})

    app = Starlette(
        routes=[
            Route("/{token}/", guarded(whole_page)),
            Route("/{token}/progress", guarded(progress)),
            Route("/{token}/saved", guarded(saved)),
            Route("/{token}/view/{name}", guarded(view)),
            Route("/{token}/act/{name}", guarded(act), methods=["POST"]),
        ]
    )
    app.router.redirect_slashes = False
    return app


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object that came with a request; raises InputError if it is none."""
    if request.headers.get("content-type") != "application/json":
        raise InputError("expected JSON")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > LARGEST_REQUEST:
            raise InputError(f"expected {LARGEST_REQUEST} bytes at most")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError("expected JSON") from error
    if not isinstance(values, dict):
        raise InputError("expected a JSON object")
    return values


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 takes a free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise InputError(
            f"--port {port}: {error.strerror}; give another, or 0 for any that is free"
        ) from error
    listener.listen()
    return listener
