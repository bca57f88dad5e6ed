"""Everything together: load, listen, decode, until a signal says to end."""

from __future__ import annotations

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType

from ..arguments import EMBEDDED_PROMPT
from .app import Desk, make_app
from .arguments import Settings
from .bridge import Bridge, Drain, Mailbox
from .dialogue import Dialogue
from .engine import Engine, load_engine
from .metrics import Metrics
from .orders import Orders
from .prompts import Prompts
from .vocabulary import Vocabulary
from .web import Web, allow_connections, listen, url_of
from .worker import Worker

logger = logging.getLogger("mlx_gemma_mtp.server")

EXIT_FAILED = 2
EXAMPLE = "Why is the sky blue?"  # what the page offers to ask


def serve(settings: Settings) -> int:
    """Serve until a signal says to end.

    Args:
        settings: The command's.

    Returns:
        Exit status.

    Raises:
        MTPError: The model cannot be loaded, or the port not opened.
    """
    _set_up_log(settings)
    if not settings.is_loopback and settings.api_key is None:
        logger.warning("other machines can send requests: --api-key asks for a key")
    opened = listen(settings)  # first: it fails sooner than a model loads
    with opened:
        engine = load_engine(settings)
        mailbox = Mailbox()
        bridge = make_bridge(engine, mailbox)
        desk = make_desk(engine, bridge)
        shutdown = _Shutdown(bridge, mailbox, settings.shutdown_timeout)
        web = Web(make_app(desk), settings, bridge, on_end=shutdown.begin)
        allow_connections(settings.limits.connections)
        shutdown.obey_signals()
        web.start(opened)
        logger.info("%s is served at %s", settings.names[0], url_of(opened))
        with engine.wired():
            Worker(engine.means, mailbox, bridge).run()
        web.stop()
        desk.executor.shutdown(wait=False, cancel_futures=True)
    logger.info("the server has shut down")
    return 0 if shutdown.is_asked_for and not bridge.is_broken else EXIT_FAILED


def make_bridge(engine: Engine, mailbox: Mailbox) -> Bridge:
    """The bridge between an engine and its clients."""
    limits = engine.settings.limits
    metrics = Metrics(
        {
            "model": engine.settings.names[0],
            "drafter": engine.drafter_name,
            "has_chat_template": bool(engine.tokenizer.has_chat_template),
            "example": EXAMPLE if engine.settings.model else EMBEDDED_PROMPT,
        },
        max_kv_bytes=engine.max_kv_bytes,
    )
    return Bridge(mailbox, metrics, max_open=limits.rows + limits.waiting)


def make_desk(engine: Engine, bridge: Bridge) -> Desk:
    """What the routes work with."""
    settings, tokenizer = engine.settings, engine.tokenizer
    return Desk(
        settings=settings,
        bridge=bridge,
        orders=Orders(
            replace(settings.limits, model_len=engine.model_len),
            settings.names,
            sampling=engine.sampling,
            # What mlx-lm's own programs keep from XTC: line ends, and the end.
            special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            vocab_size=engine.vocab_size,
            longest_alone=engine.longest_alone,
            longest_shared=engine.longest_shared,
        ),
        prompts=Prompts(tokenizer, settings.chat_template_args),
        dialogue=Dialogue(tokenizer),
        vocabulary=Vocabulary(tokenizer),
        executor=ThreadPoolExecutor(1, thread_name_prefix="tokenizer"),
    )


class _Shutdown:
    """What signals do.

    Args:
        bridge: Told that no new requests are taken.
        mailbox: Where the engine is told to finish.
        timeout_s: Seconds that it has.

    Attributes:
        is_asked_for: Whether a signal came.
    """

    def __init__(self, bridge: Bridge, mailbox: Mailbox, timeout_s: float) -> None:
        self._bridge = bridge
        self._mailbox = mailbox
        self._timeout_s = timeout_s
        self.is_asked_for = False

    def obey_signals(self) -> None:
        """Let SIGTERM and Control-C end the server."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def begin(self) -> None:
        """Take nothing new, finish what there is."""
        self._bridge.is_draining = True
        self._mailbox.put(Drain(self._timeout_s))

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.is_asked_for:
            os._exit(128 + number)  # whatever still runs
        self.is_asked_for = True
        self.begin()


def _set_up_log(settings: Settings) -> None:
    """What is said goes to standard error."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("mlx_gemma_mtp").setLevel(settings.log_level)
    logging.getLogger("uvicorn").setLevel(
        max(logging.getLevelName(settings.log_level), logging.WARNING)
    )
