"""The HTTP side's thread: uvicorn and its event loop."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from ..errors import RequestError
from .bridge import Bridge
from .protocol import limited_protocol
from .settings import Settings

logger = logging.getLogger("mlx_gemma_mtp.server")

_KEEP_ALIVE_S = 30
_FLUSH_S = 5  # for answers that are complete, at the end
_OTHER_FILES = 256  # of the process: weights, libraries, logs


def listen(settings: Settings) -> socket.socket:
    """Open the port.

    Raises:
        RequestError: It cannot be opened.
    """
    host, port = settings.host, settings.port
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = infos[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(settings.backlog)
        except BaseException:
            opened.close()
            raise
    except (OSError, UnicodeError) as error:  # a name may be no name at all
        reason = error.strerror if isinstance(error, OSError) else "no host's name"
        raise RequestError(
            f"--host and --port must be an address to listen at: got {host:.60}:"
            f"{port}: {reason or error}. Choose another port, or 0 for a free one."
        ) from error
    return opened


def url_of(opened: socket.socket) -> str:
    """Where an open port is found."""
    host, port, *_ = opened.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_connections(count: int) -> None:
    """Let the process have so many connections open; a Mac's limit is 256 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning("at most %d files can be open: %s", soft, error)


class Web:
    """Serves an application in a thread of its own.

    Args:
        app: The application.
        settings: The command's.
        bridge: Told which event loop is running.
        on_end: Called when the thread ends, asked for or not.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        bridge: Bridge,
        on_end: Callable[[], None],
    ) -> None:
        limits = settings.limits
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=limited_protocol(limits.connections),
                ws="none",
                lifespan="off",
                backlog=settings.backlog,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self._bridge = bridge
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._sockets: list[socket.socket] = []
        bridge.metrics.num_connections = lambda: len(
            self._server.server_state.connections
        )

    def start(self, opened: socket.socket) -> None:
        """Serve at an open port."""
        self._sockets.append(opened)
        self._thread.start()

    def stop(self) -> None:
        """Send what is complete, close everything, and wait for that."""
        self._server.should_exit = True
        self._thread.join(2 * _FLUSH_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            logger.exception("the HTTP side has failed")
        finally:
            self._on_end()

    async def _serve(self) -> None:
        self._bridge.attach()
        await self._server.serve(self._sockets)
