"""Everything together: load, listen, decode, until a signal says to end."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..cli.arguments import EMBEDDED_PROMPT
from .answer_parser import Dialogue
from .app import Desk, make_app
from .body_parser import BodyParser
from .bridge import Bridge, Drain, Mailbox
from .errors import SHUTTING_DOWN, AnswerError
from .forced_calls import ForcedCalls
from .forms import Forms
from .lanes import Lanes
from .metrics import Metrics
from .prompts import Prompts
from .request_log import FORMAT, WithRequest
from .served_model import ServedModel, load_served_model
from .settings import Settings
from .shutdown import Shutdown
from .thinking import ThinkingLimits
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
    shutdown = Shutdown(settings.shutdown_timeout)
    opened = listen(settings)  # first: it fails sooner than a model loads
    with opened, shutdown.obeying():
        engine = load_served_model(settings)
        mailbox = Mailbox()
        bridge = make_bridge(engine, mailbox)
        desk = make_desk(engine, bridge)
        desk.forms.prepare()

        def begin() -> None:
            bridge.is_draining = True
            # None of these prompts would be taken.
            desk.lanes.close(AnswerError(503, SHUTTING_DOWN))
            mailbox.put(Drain(settings.shutdown_timeout))

        def give_up() -> None:
            bridge.end_all(AnswerError(503, SHUTTING_DOWN))
            web.stop()

        web = Web(make_app(desk), settings, bridge, on_end=begin)
        allow_connections(settings.limits.connections)
        shutdown.start(begin=begin, give_up=give_up)
        web.start(opened)
        logger.info("%s is served at %s", settings.names[0], url_of(opened))
        with engine.wired():
            Worker(engine.means, mailbox, bridge).run()
        shutdown.is_over = True
        web.stop()
    logger.info("the server has shut down")
    return 0 if shutdown.is_asked_for and not bridge.is_broken else EXIT_FAILED


def make_bridge(engine: ServedModel, mailbox: Mailbox) -> Bridge:
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


def make_desk(engine: ServedModel, bridge: Bridge) -> Desk:
    """What the routes work with."""
    settings, tokenizer = engine.settings, engine.tokenizer
    return Desk(
        settings=settings,
        bridge=bridge,
        body_parser=BodyParser(
            replace(settings.limits, model_len=engine.model_len),
            settings.names,
            ThinkingLimits(tokenizer, engine.vocab_size),
            sampling=engine.sampling,
            # What mlx-lm's own programs keep from XTC: line ends, and the end.
            special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            vocab_size=engine.vocab_size,
            longest_alone=engine.longest_alone,
            longest_shared=engine.longest_shared,
        ),
        prompts=Prompts(
            tokenizer,
            settings.chat_template_args,
            limit=min(engine.model_len, engine.longest_alone),
        ),
        dialogue=Dialogue(tokenizer),
        forced_calls=ForcedCalls(tokenizer),
        vocabulary=Vocabulary(tokenizer),
        forms=Forms(tokenizer),
        lanes=Lanes(),
    )


def _set_up_log(settings: Settings) -> None:
    """What is said goes to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(WithRequest())
    logging.basicConfig(format=FORMAT, handlers=[handler])
    logging.getLogger("mlx_gemma_mtp").setLevel(settings.log_level)
    logging.getLogger("uvicorn").setLevel(
        max(logging.getLevelName(settings.log_level), logging.WARNING)
    )
