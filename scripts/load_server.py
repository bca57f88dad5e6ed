"""Load on the server: many streaming clients, some of whom misbehave.

Phase 1, stress: ``--clients`` clients send valid requests (half of them greedy, half
with a seed), go away in the middle, send malformed and oversized bodies. It fails
unless every valid request gets exactly the text that it gets alone, every bad one its
error, and the process's memory stays flat after the warm-up.

Phase 2, abuse: a hundred clients read streams; then four send prompts of 7 MB one after
the other, and one asks for 128 choices. It fails unless ``/health`` answers within 1 s
beside all of them, unless a client beside the latter gets its one token within 2 s
(p99), and unless memory is what it was before them, but for a tenth. Its rounds are
plain graphs of three drafts: who waits for whom is measured, and no compiler.

Phase 3, compare: well-behaved clients with greedy requests only, first few and then as
many, against this server and against ``mlx_lm.server`` without a drafter.

Run: make load, or python scripts/load_server.py --clients 200 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_gemma_mtp import embedded_pair_path

MAX_BODY = 200_000
FLATNESS = 0.05
LARGE = 7_000_000  # characters of a prompt that nobody should send
MOST_TINY_S, MOST_HEALTH_S, MOST_LEFT = 2.0, 1.0, 0.1
REST_S = 5.0
PROMPTS = (
    "def area(radius):\n",
    "import os\nimport sys\n\n\ndef main(argv):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
    "for i in range(10):\n    if i % 2:\n        print(",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "try:\n    with open(path) as file:\n        data = json.load(file)\nexcept ",
)
START_S = 120.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    """A valid request and the text that it must get.

    Attributes:
        body: The request.
        text: What it gets alone; None while that is not known.
    """

    body: dict[str, Any]
    text: str | None = None


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        first_s: Seconds from sending to the first text.
        gap_s: Seconds between two pieces of text.
        token_s: Seconds per token of a whole answer, the first token left out.
        num_tokens: Tokens of complete answers.
        outcomes: How requests ended.
        problems: What must not be, in words.
    """

    first_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Connection:
    """One HTTP/1.1 request on a connection of its own."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self._is_chunked = False
        self._length = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def request(
        cls, port: int, body: bytes | None, path: str
    ) -> AsyncIterator[Connection]:
        """Send a request, without a body a GET, and read the answer's head."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            connection = cls(reader, writer)
            method, sent = ("GET", b"") if body is None else ("POST", body)
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(sent)}\r\n\r\n"
            )
            writer.write(head.encode() + sent)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            await connection._read_head()
            yield connection
        finally:
            writer.transport.abort()

    async def _read_head(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        self.status = int(head.split(" ", 2)[1])
        self._is_chunked = "transfer-encoding: chunked" in head
        length = re.search(r"content-length: (\d+)", head)
        self._length = int(length.group(1)) if length else -1

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if not self._is_chunked and self._length >= 0:
            yield await self._reader.readexactly(self._length)
            return
        if not self._is_chunked:  # it ends with the connection
            while piece := await self._reader.read(1 << 16):
                yield piece
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of the body that are not empty."""
        held = b""
        async for piece in self.pieces():
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                if line.strip():
                    yield line.strip()
        if held.strip():
            yield held.strip()


@dataclass
class Answer:
    """A streamed answer.

    Attributes:
        text: All of it.
        at: When each piece of text came, seconds.
        num_tokens: Tokens, as the server says.
        is_complete: Whether it ended as it must.
    """

    text: str = ""
    at: list[float] = field(default_factory=list)
    num_tokens: int = 0
    is_complete: bool = False


async def read_answer(
    connection: Connection, *, most_pieces: int | None = None
) -> Answer:
    """Read a stream, or its first pieces only."""
    answer = Answer()
    async for line in connection.lines():
        if line == b"data: [DONE]":
            answer.is_complete = True
            break
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[len(b"data: ") :])
        for choice in event.get("choices", []):
            if choice.get("text"):
                answer.text += choice["text"]
                answer.at.append(time.perf_counter())
        if event.get("usage"):
            answer.num_tokens = event["usage"]["completion_tokens"]
        if most_pieces is not None and len(answer.at) >= most_pieces:
            break
    return answer


class Clients:
    """Clients of one server.

    Args:
        port: Where it listens.
        cases: What they ask for.
        seed: Of their choices.
        is_rude: Whether some go away and some send nonsense.
    """

    def __init__(
        self, port: int, cases: Sequence[Case], *, seed: int, is_rude: bool
    ) -> None:
        self.port = port
        self.tally = Tally()
        self._cases = cases
        self._random = random.Random(seed)
        self._is_rude = is_rude

    async def run(self, count: int, seconds: float) -> float:
        """Let them send one request after the other; return how long it took."""
        start = time.perf_counter()
        end = start + seconds
        await asyncio.gather(*(self._client(end) for _ in range(count)))
        return time.perf_counter() - start

    async def _client(self, end: float) -> None:
        while time.perf_counter() < end:
            kind = self._random.random() if self._is_rude else 1.0
            try:
                if kind < 0.04:
                    await self._send_malformed()
                elif kind < 0.06:
                    await self._send_oversized()
                elif kind < 0.2:
                    await self._go_away()
                else:
                    await self.ask(self._random.choice(self._cases))
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                self._problem(f"a connection failed: {error!r}", "connection failed")

    async def ask(self, case: Case) -> Answer:
        """Send a valid request and check its answer."""
        start = time.perf_counter()
        async with Connection.request(
            self.port, dump(case.body), COMPLETIONS
        ) as connection:
            if connection.status != 200:
                text = b"".join([p async for p in connection.pieces()])
                self._problem(
                    f"a valid request got {connection.status}: {text[:200]!r}",
                    "refused",
                )
                return Answer()
            answer = await read_answer(connection)
        self._count(case, answer, start)
        return answer

    def _count(self, case: Case, answer: Answer, start: float) -> None:
        tally = self.tally
        if not answer.is_complete:
            self._problem("an answer ended early", "incomplete")
            return
        if case.text is not None and answer.text != case.text:
            self._problem(
                f"another text than alone: {answer.text!r}, alone {case.text!r}",
                "other text",
            )
            return
        tally.outcomes["complete"] += 1
        tally.num_tokens += answer.num_tokens
        if answer.at:
            tally.first_s.append(answer.at[0] - start)
            pairs = zip(answer.at[1:], answer.at, strict=False)
            tally.gap_s += [later - earlier for later, earlier in pairs]
            if answer.num_tokens > 1:
                duration = answer.at[-1] - answer.at[0]
                tally.token_s.append(duration / (answer.num_tokens - 1))

    async def _go_away(self) -> None:
        """Leave in the middle of an answer, or before its beginning."""
        case = self._random.choice(self._cases)
        most = self._random.randrange(6)
        async with Connection.request(
            self.port, dump(case.body), COMPLETIONS
        ) as connection:
            if most:
                await read_answer(connection, most_pieces=most)
        self.tally.outcomes["went away"] += 1

    async def _send_malformed(self) -> None:
        bad: list[bytes] = [
            b"{",
            b"[]",
            b"\xff\xfe",
            b'{"prompt": 1.5}',
            b'{"prompt": "x", "temperature": "warm"}',
            b'{"prompt": "x", "max_tokens": -2}',
            b'{"prompt": [1, 99999999]}',
            b'{"prompt": "x", "n": 1e9}',
            b"[" * 5000,
            b'{"prompt": "x", "stop": [""]}',
            b'{"prompt": "x", "logit_bias": {"a": 1}}',
        ]
        await self._expect(self._random.choice(bad), 400, "malformed")

    async def _send_oversized(self) -> None:
        text = "x" * (MAX_BODY + self._random.randrange(MAX_BODY))
        await self._expect(dump({"prompt": text}), 413, "oversized")

    async def _expect(self, body: bytes, status: int, name: str) -> None:
        async with Connection.request(self.port, body, COMPLETIONS) as connection:
            text = b"".join([piece async for piece in connection.pieces()])
            if connection.status != status or b'"error"' not in text:
                self._problem(
                    f"{name}: {connection.status}, expected {status}: {text[:200]!r}",
                    f"{name}, wrong answer",
                )
            else:
                self.tally.outcomes[name] += 1

    def _problem(self, text: str, name: str) -> None:
        self.tally.outcomes[name] += 1
        self.tally.problems.append(text)


def dump(body: Any) -> bytes:
    """A body as JSON."""
    return json.dumps(body).encode()


def make_cases(*, has_seeds: bool) -> list[Case]:
    """Valid requests, each another one."""
    cases = []
    for i, prompt in enumerate(PROMPTS):
        for j, max_tokens in enumerate((16, 32, 48, 64)):
            body: dict[str, Any] = {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if has_seeds and (i + j) % 2:
                body |= {"temperature": 0.8, "top_k": 40, "seed": 100 * i + j}
            cases.append(Case(body))
    return cases


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int | None, **environment: str
) -> Iterator[tuple[int, int]]:
    """Run a server; gives its process id and port, and ends it.

    Args:
        command: The command.
        port: Where it will listen; None to read that from what it says.
        environment: More variables.
    """
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stderr=log,
            stdout=log,
            env={**os.environ, **environment},
        )
        try:
            yield process.pid, wait_for_port(process, Path(log.name), port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            text = Path(log.name).read_text(errors="replace")
            for line in text.splitlines():
                if "Traceback" in line or "ERROR" in line:
                    print(f"  the server said: {line}", file=sys.stderr)


def wait_for_port(process: subprocess.Popen[bytes], log: Path, port: int | None) -> int:
    """Wait until a server listens.

    Raises:
        SystemExit: It does not.
    """
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"is served at http://\S+:(\d+)", log.read_text())
        known = port or (found and int(found.group(1)))
        if known:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", known), timeout=1),
            ):
                return int(known)
        time.sleep(0.2)
    raise SystemExit(f"the server has not started:\n{log.read_text()}")


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    found = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(found.stdout) * 1024 / 1e6


async def watch_memory(pid: int, found: list[float]) -> None:
    """Note a process's memory every second."""
    while True:
        found.append(rss_mb(pid))
        await asyncio.sleep(1)


async def repeat(seconds: float, ask: Callable[[], Awaitable[int]]) -> list[float]:
    """Ask again and again; the seconds that each answer took.

    Raises:
        ValueError: An answer was no success.
    """
    found = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        status = await ask()
        if status != 200:
            raise ValueError(f"a good request got {status}")
        found.append(time.perf_counter() - start)
    return found


async def status_of(port: int, body: bytes | None, path: str) -> int:
    """The status of an answer that was read to its end."""
    async with Connection.request(port, body, path) as connection:
        async for _ in connection.pieces():
            pass
        return connection.status


async def abuse(pid: int, port: int, args: argparse.Namespace) -> list[str]:
    """Phase 2; returns what went wrong."""
    words = " ".join(PROMPTS) * (LARGE // 300)
    turns = [{"role": r, "content": words[: LARGE // 2]} for r in ("user", "assistant")]
    large: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": words[:LARGE]}),
        (CHAT, {"messages": [{"role": "user", "content": words[:LARGE]}]}),
        (CHAT, {"messages": [*turns, turns[0]]}),
        (COMPLETIONS, {"prompt": [words[:LARGE]]}),
    ]
    many = dump({"prompt": PROMPTS[0], "n": 128, "max_tokens": 16})
    tiny = dump({"prompt": "a", "max_tokens": 1})

    def asking(path: str, body: bytes | None) -> Callable[[], Awaitable[int]]:
        return lambda: status_of(port, body, path)

    async def flood(path: str, body: bytes, end: float) -> Counter[int]:
        found: Counter[int] = Counter()
        while time.perf_counter() < end:
            found[await status_of(port, body, path)] += 1
        return found

    streaming = Clients(port, make_cases(has_seeds=False), seed=5, is_rude=False)
    seconds, health_of_streams = await asyncio.gather(
        streaming.run(args.streams, args.abuse_seconds),
        repeat(args.abuse_seconds, asking("/health", None)),
    )
    describe(f"{args.streams} streams", streaming.tally, seconds)
    for _ in range(2):  # kernels for as many rows are compiled, and stay
        await status_of(port, many, COMPLETIONS)
    await asyncio.sleep(REST_S)
    before = rss_mb(pid)
    alone = await repeat(args.abuse_seconds / 2, asking(COMPLETIONS, tiny))
    large_bodies = [(path, dump(body)) for path, body in large]
    end = time.perf_counter() + args.abuse_seconds
    floods = [asyncio.create_task(flood(*each, end)) for each in large_bodies]
    floods.append(asyncio.create_task(flood(COMPLETIONS, many, end)))
    beside, health = await asyncio.gather(
        repeat(args.abuse_seconds, asking(COMPLETIONS, tiny)),
        repeat(args.abuse_seconds, asking("/health", None)),
    )
    statuses = [dict(found) for found in await asyncio.gather(*floods)]
    await asyncio.sleep(REST_S)
    after = rss_mb(pid)
    p99 = statistics.quantiles(beside, n=100, method="inclusive")[98]
    print(f"abuse: large prompts and 128 choices got {statuses}")
    print(
        f"  one token: p50 {statistics.median(alone):.3f} s alone, beside them "
        f"{statistics.median(beside):.3f} s, p99 {p99:.3f} s, most {max(beside):.3f} s"
    )
    print(
        f"  /health: at most {max(health):.3f} s beside them, "
        f"{max(health_of_streams):.3f} s beside {args.streams} streams"
    )
    print(f"  memory: {before:.0f} MB before, {after:.0f} MB after")
    checks = {
        f"one token took {p99:.1f} s (p99)": p99 < MOST_TINY_S,
        "/health was slow": max(health + health_of_streams) < MOST_HEALTH_S,
        "memory was not given back": after <= before * (1 + MOST_LEFT),
    }
    return [text for text, is_good in checks.items() if not is_good]


async def learn_texts(port: int, cases: Sequence[Case]) -> list[Case]:
    """Ask for every case alone."""
    alone = Clients(port, cases, seed=0, is_rude=False)
    return [Case(case.body, (await alone.ask(case)).text) for case in cases]


async def stress(pid: int, port: int, args: argparse.Namespace) -> list[str]:
    """Phase 1; returns what went wrong."""
    cases = await learn_texts(port, make_cases(has_seeds=True))
    print(f"{len(cases)} requests, each alone first")
    warm_up = Clients(port, cases, seed=1, is_rude=True)
    await warm_up.run(args.clients, args.warm_up)
    print(f"warm-up, {args.warm_up:.0f} s: {dict(warm_up.tally.outcomes)}")
    clients = Clients(port, cases, seed=2, is_rude=True)
    memory: list[float] = []
    watch = asyncio.create_task(watch_memory(pid, memory))
    cpu = time.process_time()
    seconds = await clients.run(args.clients, args.seconds)
    cpu = time.process_time() - cpu
    watch.cancel()
    describe("stress", clients.tally, seconds)
    print(f"  the clients themselves took {cpu / seconds:.2f} cores")
    problems = warm_up.tally.problems + clients.tally.problems
    return problems + check_memory(memory)


def check_memory(memory: Sequence[float]) -> list[str]:
    """Whether memory has grown, from the first sixth to the last."""
    part = max(len(memory) // 6, 1)
    before = statistics.median(memory[:part])
    after = statistics.median(memory[-part:])
    growth = after / before - 1
    print(
        f"  memory: {before:.0f} MB at first, {after:.0f} MB at last ({growth:+.1%}), "
        f"most {max(memory):.0f} MB"
    )
    if growth > FLATNESS:
        return [f"memory has grown by {growth:.1%}"]
    return []


def describe(name: str, tally: Tally, seconds: float) -> None:
    """Print what clients saw."""
    print(f"{name}: {seconds:.0f} s, {dict(tally.outcomes)}")
    print(
        f"  {tally.num_tokens / seconds:.1f} tokens/s, "
        f"{tally.outcomes['complete'] / seconds:.2f} requests/s"
    )
    for what, values in (
        ("first token", tally.first_s),
        ("between pieces", tally.gap_s),
        ("per token", tally.token_s),
    ):
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100)
            p50, p95, p99 = (1000 * cuts[i - 1] for i in (50, 95, 99))
            print(f"  {what}: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def own_command(args: argparse.Namespace, max_body: int = MAX_BODY) -> list[str]:
    """The command of this package's server."""
    return [
        "mlx_gemma_mtp.server",
        "--port",
        "0",
        "--max-request-bytes",
        str(max_body),
        "--max-rows",
        str(args.max_rows),
        "--log-level",
        "INFO",
    ]


async def compare(name: str, port: int, args: argparse.Namespace) -> None:
    """Phase 3 with one server."""
    cases = make_cases(has_seeds=False)
    for count in args.compare_clients:
        warm_up = args.compare_seconds / 2
        await Clients(port, cases, seed=3, is_rude=False).run(count, warm_up)
        clients = Clients(port, cases, seed=4, is_rude=False)
        seconds = await clients.run(count, args.compare_seconds)
        describe(f"{name}, {count} clients, greedy", clients.tally, seconds)
        for problem in clients.tally.problems[:1]:
            print(f"  {problem}")


def main() -> int:
    """Run the phases; exit status 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--compare-clients", type=int, nargs="+", default=[1, 8, 200])
    parser.add_argument("--compare-seconds", type=float, default=40.0)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument(
        "--phase", choices=("stress", "abuse", "compare", "all"), default="all"
    )
    parser.add_argument("--abuse-seconds", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=100)
    args = parser.parse_args()
    problems: list[str] = []
    if args.phase in ("stress", "all"):
        with running(own_command(args), None) as (pid, port):
            problems += asyncio.run(stress(pid, port, args))
    if args.phase in ("abuse", "all"):
        command = [*own_command(args, 2 * LARGE), "--num-draft-tokens", "3"]
        with running(command, None, MLX_DISABLE_COMPILE="1") as (pid, port):
            problems += asyncio.run(abuse(pid, port, args))
    if args.phase in ("compare", "all"):
        with running(own_command(args), None) as (_, port):
            asyncio.run(compare("mlx_gemma_mtp.server", port, args))
        port = free_port()
        command = ["mlx_lm", "server", "--model", str(embedded_pair_path())]
        with running([*command, "--port", str(port)], port) as (_, port):
            asyncio.run(compare("mlx_lm.server, plain", port, args))
    for text, count in Counter(problems).most_common(10):
        print(f"FAILED {count} times: {text}")
    print("failed" if problems else "passed")
    return 1 if problems else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
