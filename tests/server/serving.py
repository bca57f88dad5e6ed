"""What tests of the server share: a scripted decoder, servers, a client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.results import PromptProgress, SequenceOutput, StepOutput
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.engine.stats import RoundStats
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.markup.answer import Marks
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_tokenizer
from mlx_gemma_mtp.sampling.logprobs import TokenLogprobs
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.server.app import Desk, make_app
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.bridge import Bridge, Drain, Mailbox
from mlx_gemma_mtp.server.choice import Choice
from mlx_gemma_mtp.server.errors import SHUTTING_DOWN, AnswerError
from mlx_gemma_mtp.server.prompts import Prompts
from mlx_gemma_mtp.server.serve import make_bridge, make_desk
from mlx_gemma_mtp.server.served_model import ServedModel, load_served_model
from mlx_gemma_mtp.server.settings import Settings
from mlx_gemma_mtp.server.transcript import Transcript
from mlx_gemma_mtp.server.web import Web, listen
from mlx_gemma_mtp.server.worker import Means, Worker
from tests.gemma import SPECIAL
from tests.server.served import server_process

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 1024  # of the embedded pair
EOS = 1
# Anything with turns; its marks are plain text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}# {{ message.content }}\n{% else %}"
    "{{ message.content }}{% endif %}{% endfor %}"
)
WAIT_S = 60.0


@cache
def tokenizer() -> Any:
    """The embedded pair's, with a chat template."""
    return load_tokenizer(
        embedded_pair_path(), {"chat_template": CHAT_TEMPLATE}, (EOS,)
    )


@cache
def prompts_of(tokenizer: Any) -> Prompts:
    """As a server has them: made once, since all of the vocabulary is looked at."""
    return Prompts(tokenizer, {})


class MarkedTokenizer:
    """As much of a tokenizer as says which marks answers have."""

    chat_template = None

    def get_added_vocab(self) -> dict[str, int]:
        return {mark: token for token, mark in SPECIAL.items()}


def tokens_of(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


class ScriptedDecoder:
    """Emits what the script has for a prompt, some tokens a step.

    Args:
        script: From a prompt's tokens to the answer's, its end included or not.
        block: Tokens of a row and step, all but one of them from a draft.
        max_rows: Rows that are emitted for together.
        chunk: Most tokens of a prompt that a step reads; None for any number.

    Attributes:
        steps: How many have begun.
        asked: How many were asked for: one more while a step waits to be allowed.
        allowed: How many steps may be run; None for any number.
        added: The requests, with the caches that came with them.
        removed: Rows that were sent away.
        error: Raised by the next step.
        row_error: What a row's own function has raised, by the row's prompt.
    """

    def __init__(
        self,
        script: Callable[[Sequence[int]], Sequence[int]],
        *,
        block: int = 3,
        max_rows: int = 4,
        chunk: int | None = None,
    ) -> None:
        self.stats = RoundStats()
        self.steps = 0
        self.asked = 0
        self.allowed: threading.Semaphore | None = None
        self.added: list[tuple[Request, Any]] = []
        self.removed: list[TokenSequence] = []
        self.error: Exception | None = None
        self.row_errors: dict[tuple[int, ...], Exception] = {}
        self.is_closed = False
        self._script = script
        self._block = block
        self._max_rows = max_rows
        self._chunk = chunk
        self._waiting: list[TokenSequence] = []
        self._live: list[TokenSequence] = []
        self._num_read: dict[TokenSequence, int] = {}

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._live

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        return 1000 * len(self._live)

    def add(self, request: Request, prompt_cache: Any = None) -> TokenSequence:
        self.added.append((request, prompt_cache))
        if request.max_tokens == 999:
            raise RequestError("max_tokens must fit: got 999. Ask for fewer.")
        row = TokenSequence.of(request, num_cached=len(request.history))
        self._waiting.append(row)
        return row

    def remove(self, row: TokenSequence) -> None:
        self.removed.append(row)
        row.finish_reason = row.finish_reason or "removed"
        self._waiting = [r for r in self._waiting if r is not row]
        self._live = [r for r in self._live if r is not row]

    def extract(
        self, row: TokenSequence, *, num_emitted: int | None = None
    ) -> Sequence[Any]:
        tokens = [*row.request.history, *row.request.prompt[: self._num_read[row]]]
        return [ScriptedCache([*tokens, *row.emitted[:num_emitted]])]

    def close(self) -> None:
        self.is_closed = True

    def step(self) -> StepOutput:
        self.asked += 1
        if self.allowed is not None:
            assert self.allowed.acquire(timeout=WAIT_S)
        self.steps += 1
        if self.error is not None:
            raise self.error
        emissions = [self._emit(row) for row in list(self._live)]
        progress = self._read()
        self._live = [row for row in self._live if row.is_live]
        return StepOutput(emissions, progress)

    def _read(self) -> list[PromptProgress]:
        """Read one prompt up to its next pause, or a chunk of it."""
        if not self._waiting or len(self._live) >= self._max_rows:
            return []
        row = self._waiting[0]
        length = len(row.request.prompt)
        before = self._num_read.get(row, 0)
        pauses = row.request.pauses
        end = min(p for p in (*pauses, length) if p > before)
        if self._chunk is not None:
            end = min(end, before + self._chunk)
        self._num_read[row] = end
        if end == length:
            self._live.append(self._waiting.pop(0))
        return [PromptProgress(row, end, length, is_paused=end in pauses)]

    def _emit(self, row: TokenSequence) -> SequenceOutput:
        prompt = (*row.request.history, *row.request.prompt)
        error = self.row_errors.get(prompt)
        answer = self._script(prompt)[row.num_emitted :][: self._block]
        taken = [] if error else row.take(answer)
        if error:
            row.finish_reason = "error"
        for stats in (self.stats, row.stats):
            stats.add_round(drafted=self._block, accepted=max(len(taken) - 1, 0))
        count = row.request.num_logprobs
        return SequenceOutput(
            sequence=row,
            place=0,
            tokens=taken,
            num_from_draft=max(len(taken) - 1, 0),
            finish_reason=row.finish_reason,
            logits=cast(Any, None),
            logprobs=[]
            if count is None
            else [TokenLogprobs(-0.5, [(t, -0.5)] * count) for t in taken],
            error=error,
        )


@dataclass
class ScriptedCache:
    """Stands for mlx-lm's cache: it knows what it holds."""

    tokens: list[int]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = 10 * len(self.tokens)

    def is_trimmable(self) -> bool:
        return False


def echo(prompt: Sequence[int]) -> list[int]:
    """A script: the prompt again and again, for longer than a text may be here."""
    return list(prompt[1:] or prompt) * 2000


def make_scripted_request(choice: Choice) -> Request:
    """A request of an order, checked as little as the engine's own."""
    return Request(
        prompt=list(choice.prompt),
        max_tokens=choice.max_tokens,
        sampling=SamplingParams(),
        eos_token_ids=frozenset([EOS]),
        num_logprobs=choice.num_logprobs,
        max_draft_tokens=choice.max_draft_tokens,
        draft_source=choice.draft_source,
        prediction=choice.prediction,
    )


def scripted_means(decoder: ScriptedDecoder, **fields: Any) -> Means:
    """What a worker needs, around a scripted decoder."""
    means = Means(
        decoder=cast(Any, decoder),
        make_request=make_scripted_request,
        make_transcript=lambda choice: Transcript(
            tokenizer().detokenizer, choice, Marks(())
        ),
        kept=None,
        max_rows=4,
        leaves_room=lambda choices: True,
        window=16,
        rung_interval=1024,
        memory=lambda: (1, 2),
    )
    return replace(means, **fields)


def scripted_engine(settings: Settings, means: Means) -> ServedModel:
    return ServedModel(
        settings=settings,
        means=means,
        tokenizer=tokenizer(),
        sampling={"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        model_len=settings.limits.model_len or 1024,
        vocab_size=VOCAB_SIZE,
        max_kv_bytes=10**9,
        longest_alone=2**20,
        longest_shared=2**20,
        drafter_name="drafter",
        wired=contextlib.nullcontext,
    )


@dataclass
class Parts:
    """A server's parts, its worker running."""

    mailbox: Mailbox
    bridge: Bridge
    desk: Desk
    worker: Worker
    thread: threading.Thread


@contextlib.contextmanager
def working(means: Means, *arguments: str, starts: bool = True) -> Iterator[Parts]:
    """The parts of a server around means, without HTTP."""
    settings = parse(["--port", "0", *arguments])
    with working_engine(scripted_engine(settings, means), starts=starts) as parts:
        yield parts


@contextlib.contextmanager
def working_engine(engine: ServedModel, *, starts: bool = True) -> Iterator[Parts]:
    """The parts of a server around an engine, without HTTP.

    Without ``starts`` the caller starts the thread; what was submitted until then is
    taken together.
    """
    mailbox = Mailbox()
    bridge = make_bridge(engine, mailbox)
    desk = make_desk(engine, bridge)
    worker = Worker(engine.means, mailbox, bridge)
    thread = threading.Thread(target=worker.run)
    if starts:
        thread.start()
    try:
        yield Parts(mailbox, bridge, desk, worker, thread)
    finally:
        mailbox.put(Drain(0.0))
        decoder = engine.means.decoder
        if isinstance(decoder, ScriptedDecoder) and decoder.allowed is not None:
            decoder.allowed.release(1000)
        thread.join(WAIT_S)
        desk.lanes.close(AnswerError(503, SHUTTING_DOWN))
        assert not thread.is_alive()


@contextlib.contextmanager
def scripted_server(means: Means, *arguments: str) -> Iterator[tuple[Client, Parts]]:
    """A server around means, in this process, and a client for it."""
    with working(means, *arguments) as parts, answering(parts) as client:
        yield client, parts


@contextlib.contextmanager
def pair_server(folder: Path, *arguments: str) -> Iterator[tuple[Client, Parts]]:
    """A server of a folder's pair, in this process, and a client for it."""
    settings = parse(["--port", "0", "--model", str(folder), *arguments])
    with (
        working_engine(load_served_model(settings)) as parts,
        answering(parts) as client,
    ):
        yield client, parts


@contextlib.contextmanager
def answering(parts: Parts) -> Iterator[Client]:
    """Let a server's parts answer over HTTP; a client for them."""
    settings = parts.desk.settings
    opened = listen(settings)
    web = Web(make_app(parts.desk), settings, parts.bridge, on_end=lambda: None)
    web.start(opened)
    try:
        yield Client(opened.getsockname()[1], settings.api_key)
    finally:
        web.stop()
        opened.close()


@dataclass
class Response:
    """A client's view of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream that ended as it must."""
        lines = [line for line in self.body.split(b"\n\n") if line]
        assert lines.pop() == b"data: [DONE]"
        return [
            json.loads(line.removeprefix(b"data: "))
            for line in lines
            if not line.startswith(b":")
        ]

    @property
    def named_events(self) -> list[Any]:
        """The objects of a stream whose events have names, which are their types."""
        events = []
        for lines in self.body.decode().split("\n\n")[:-1]:
            name, data = lines.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events

    @property
    def is_openais(self) -> bool:
        """Whether an error is in OpenAI's form; else it is in Anthropic's."""
        return "request_id" not in self.json()

    @property
    def message(self) -> str:
        """What an error says."""
        error = self.json()["error"]
        names = {"message", "type"}
        assert set(error) == names | ({"param", "code"} if self.is_openais else set())
        return str(error["message"])


class Client:
    """Asks a server on this machine."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port = port
        self.key = key

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """Send a request and read the whole answer."""
        connection = self.connect()
        try:
            self.send(connection, method, path, body, **headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Response(answer.status, found, answer.read())
        finally:
            connection.close()

    def send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any = None,
        **headers: str,
    ) -> None:
        """Send a request; a body that is no bytes as JSON."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key is not None:
            names.setdefault("authorization", f"Bearer {self.key}")
        if body is not None:
            names.setdefault("content-type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, names)

    def get(self, path: str, **headers: str) -> Response:
        return self.ask("GET", path, **headers)

    def complete(self, prompt: Any = "a b", **fields: Any) -> Response:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, **fields})

    def chat(self, content: Any = "a b", **fields: Any) -> Response:
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, **fields}
        return self.ask("POST", "/v1/chat/completions", body)

    def stream(self, prompt: Any = "a b", **fields: Any) -> list[Any]:
        """The events of a streamed completion."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = self.complete(prompt, **options, **fields)
        assert response.status == 200, response.body
        return response.events

    def text(self, prompt: Any = "a b", **fields: Any) -> str:
        """The text of a completion."""
        response = self.complete(prompt, **fields)
        assert response.status == 200, response.body
        return str(response.json()["choices"][0]["text"])


@contextlib.contextmanager
def running_command(
    *arguments: str,
) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """The command in a process of its own, with the embedded pair."""
    with (
        tempfile.TemporaryDirectory() as folder,
        # Rounds as plain graphs: kernels take a minute to compile.
        server_process(Path(folder), *arguments, MLX_DISABLE_COMPILE="1") as running,
    ):
        address, process = running
        yield Client(int(address.rsplit(":", 1)[1])), process


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def run_async(coroutine: Any) -> Any:
    """Run a coroutine, not for ever."""
    return asyncio.run(asyncio.wait_for(coroutine, WAIT_S))
