"""Work before the row: what is refused unread, who waits for the tokenizer, and where.

Run: python -m pytest tests/server/test_before_the_row.py
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_gemma_mtp.generation import chat_template
from mlx_gemma_mtp.generation.encoding import encode_text, least_tokens, longest_token
from mlx_gemma_mtp.server import lanes as lanes_module
from mlx_gemma_mtp.server import prompts as prompts_module
from mlx_gemma_mtp.server import tidy
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.lanes import MOST_SHORT, BySize, Lanes
from mlx_gemma_mtp.server.lengths import Lengths
from mlx_gemma_mtp.server.schema import ChatBody, CompletionBody
from mlx_gemma_mtp.server.tidy import Tidied, memory_returner
from tests.server.serving import (
    CHAT_TEMPLATE,
    WAIT_S,
    ScriptedDecoder,
    echo,
    run_async,
    scripted_means,
    scripted_server,
    tokenizer,
    wait_until,
)
from tests.tiny import tiny_tokenizer

LONGEST = 16  # characters of the embedded pair's longest token
TOO_LONG = "ab " * 6000  # for 1024 tokens, whatever the tokenizer makes of it


def part_of_text():
    """What texts are made of, tokens and what is special to encoding among them."""
    pieces = sorted(tokenizer().get_vocab(), key=len)[-200:]
    special = ["<bos>", "<eos>", " <bos>", "▁", "é", "\u0000", "€", "😀"]
    return (
        st.text(max_size=8)
        | st.sampled_from([piece.replace("▁", " ") for piece in pieces])
        | st.sampled_from(special)
        | st.builds(str.__mul__, st.sampled_from(" \n\ta"), st.integers(1, 99))
    )


class TestLengths:
    def test_the_longest_token(self):
        assert longest_token(tokenizer()) == LONGEST

    @given(st.lists(part_of_text(), max_size=20).map("".join))
    def test_no_text_has_fewer_tokens(self, text):
        found = encode_text(tokenizer(), text)
        assert least_tokens(tokenizer(), text, LONGEST) <= len(found)

    def test_texts_that_encoding_makes_one_token_of(self):
        assert least_tokens(tokenizer(), "<bos>" * 9000, LONGEST) == 0
        assert least_tokens(tokenizer(), " " * 9000 + "<bos>a", LONGEST) == 1

    def test_a_tokenizer_that_may_drop_characters_has_no_longest_token(self):
        from tokenizers import normalizers, pre_tokenizers

        def changed(**parts):
            found = tiny_tokenizer()
            for name, part in parts.items():
                setattr(found.backend_tokenizer, name, part)
            return longest_token(found)

        # Its vocabulary has no bytes but for three: others become nothing.
        assert longest_token(tiny_tokenizer()) is None
        complete = tokenizer()._tokenizer
        assert longest_token(complete) == LONGEST
        before = complete.backend_tokenizer.normalizer
        kinds = (
            normalizers.Strip(),
            normalizers.NFKC(),
            normalizers.Replace("  ", " "),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Strip()]),
        )
        try:
            for kind in kinds:
                complete.backend_tokenizer.normalizer = kind
                assert longest_token(complete) is None
            longer = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁▁")]
            complete.backend_tokenizer.normalizer = normalizers.Sequence(longer)
            assert longest_token(complete) == LONGEST
            complete.backend_tokenizer.normalizer = before
            complete.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            assert longest_token(complete) is None
        finally:
            complete.backend_tokenizer.normalizer = before
            complete.backend_tokenizer.pre_tokenizer = None

    def test_a_template_that_forgets_what_was_said(self, monkeypatch):
        """Only its text says how long a conversation is."""
        messages = [{"role": "user", "content": TOO_LONG}]
        with pytest.raises(AnswerError, match="at most 1024 tokens"):
            Lengths(tokenizer(), 1024, {}).check_messages(messages)
        last_only = "{{ messages[-1].content }}"
        monkeypatch.setattr(tokenizer()._tokenizer, "chat_template", last_only)
        Lengths(tokenizer(), 1024, {}).check_messages(messages)


def never(*_args, **_settings):
    raise AssertionError("this was to be refused before")


class TestRefusals:
    @pytest.fixture
    def client(self):
        arguments = ("--chat-template", CHAT_TEMPLATE)
        with scripted_server(scripted_means(ScriptedDecoder(echo)), *arguments) as (
            client,
            _,
        ):
            yield client

    def refused(self, response, param):
        error = response.json()["error"]
        assert response.status == 400
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert "at most 1024 tokens" in response.message

    def test_a_text_is_not_encoded(self, client, monkeypatch):
        monkeypatch.setattr(prompts_module, "encode_text", never)
        self.refused(client.complete(TOO_LONG), "prompt")
        self.refused(client.complete(["a", TOO_LONG]), "prompt")

    def test_messages_are_not_rendered(self, client, monkeypatch):
        monkeypatch.setattr(prompts_module, "apply_chat_template", never)
        self.refused(client.chat(TOO_LONG), "messages")

    def test_what_a_template_writes_is_not_encoded(self, client, monkeypatch):
        monkeypatch.setattr(chat_template, "encode_text", never)
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": TOO_LONG},
            {"role": "user", "content": "b"},
        ]
        body = {"messages": messages}
        self.refused(client.ask("POST", "/v1/chat/completions", body), "messages")

    def test_what_may_fit_is_not_refused(self, client):
        """White space that a template may drop, and marks that become one token."""
        messages = [{"role": "user", "content": " " * 99_000 + "a"}]
        Lengths(tokenizer(), 1024, {}).check_messages(messages)
        assert client.complete("<bos>" * 9000 + "a", max_tokens=1).status == 200


def endless(has_ended):
    """What a chat template does with very many messages."""
    try:
        while True:
            sum(range(1000))
    finally:
        has_ended.set()


class TestRoom:
    def test_a_prompt_that_takes_too_long_is_given_up(self, monkeypatch):
        has_ended = threading.Event()
        monkeypatch.setattr(lanes_module, "LIMIT_S", 0.01)
        monkeypatch.setattr(
            prompts_module, "encode_text", lambda *_: endless(has_ended)
        )
        with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, parts):
            response = client.complete()
            assert response.status == 400
            assert "Send fewer messages, or less text." in response.message
            assert has_ended.wait(WAIT_S)
            assert parts.bridge._num_prepared == 0

    def test_what_waits_for_the_tokenizer_is_counted(self, monkeypatch):
        may_encode = threading.Event()
        encode = prompts_module.encode_text

        def slow(*args):
            assert may_encode.wait(WAIT_S)
            return encode(*args)

        monkeypatch.setattr(prompts_module, "encode_text", slow)
        means = scripted_means(ScriptedDecoder(echo), max_rows=1)
        limits = ("--max-rows", "1", "--max-waiting", "2")
        with scripted_server(means, *limits) as (client, parts):
            opened = [client.connect() for _ in range(3)]
            for connection in opened:
                body = {"prompt": "a b", "max_tokens": 2}
                client.send(connection, "POST", "/v1/completions", body)
            bridge = parts.bridge
            wait_until(lambda: bridge._num_prepared == 3)
            response = client.complete()
            assert response.status == 429
            assert "3 decode or wait, at most 3 may" in response.message
            may_encode.set()
            for connection in opened:
                assert connection.getresponse().status == 200
                connection.close()
            assert client.complete(max_tokens=2).status == 200
            assert bridge._num_prepared == 0

    def test_a_short_text_does_not_wait_for_a_long_one(self, monkeypatch):
        may_encode = threading.Event()
        encode = prompts_module.encode_text
        asked = []

        def slow(tokenizer, text):
            asked.append(text)
            if len(text) > MOST_SHORT:
                assert may_encode.wait(WAIT_S)
            return encode(tokenizer, text)

        monkeypatch.setattr(prompts_module, "encode_text", slow)
        long = "ab " * (MOST_SHORT // 3 + 1)
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--max-model-len", "200000") as (client, parts):
            first, gone = client.connect(), client.connect()
            for connection in (first, gone):
                body = {"prompt": long, "max_tokens": 1}
                client.send(connection, "POST", "/v1/completions", body)
            wait_until(lambda: parts.bridge._num_prepared == 2)
            assert client.complete(max_tokens=2).status == 200
            gone.close()  # while it waits for its turn
            wait_until(lambda: parts.bridge._num_prepared == 1)
            may_encode.set()
            assert first.getresponse().status == 200
            first.close()
            assert client.complete(long, max_tokens=1).status == 200
        assert asked.count(long) == 2


class TestLanes:
    @given(st.lists(st.integers(0, 9), min_size=1))
    def test_the_smallest_and_the_oldest_take_turns(self, sizes):
        waiting: BySize[int] = BySize()
        for index, size in enumerate(sizes):
            waiting.append(size, index)
        left = list(range(len(sizes)))
        for turn in range(len(sizes)):
            found = waiting.take()
            best = min(left, key=lambda i: (sizes[i], i)) if turn % 2 == 0 else left[0]
            assert found == best
            left.remove(found)
        assert not len(waiting)

    def test_an_error_is_the_callers(self):
        async def test():
            lanes = Lanes()
            with pytest.raises(ZeroDivisionError):
                await lanes.run(1, lambda: 1 // 0)
            assert await lanes.run(MOST_SHORT + 1, lambda: 7) == 7
            lanes.close(KeyError())

        run_async(test())

    @pytest.mark.parametrize("size", [1, MOST_SHORT + 1])
    def test_what_takes_too_long_is_stopped(self, size, monkeypatch):
        monkeypatch.setattr(lanes_module, "LIMIT_S", 0.01)
        has_ended = threading.Event()

        async def test():
            lanes = Lanes()
            with pytest.raises(asyncio.TimeoutError):
                await lanes.run(size, lambda: endless(has_ended))
            monkeypatch.setattr(lanes_module, "LIMIT_S", WAIT_S)
            assert await lanes.run(size, lambda: 7) == 7  # its turn has come
            assert has_ended.is_set()
            lanes.close(KeyError())

        run_async(test())

    def test_what_nobody_waits_for_is_stopped(self):
        async def test():
            lanes, has_begun, has_ended = Lanes(), threading.Event(), threading.Event()

            def begun():
                has_begun.set()
                endless(has_ended)

            waits = asyncio.ensure_future(lanes.run(1, lambda: 1 // 0))
            await asyncio.sleep(0)
            waits.cancel()  # perhaps before its turn
            call = lanes.run(1, begun)
            runs = asyncio.ensure_future(call)
            while not has_begun.is_set():
                await asyncio.sleep(0.001)
            runs.cancel()
            assert await lanes.run(1, lambda: 7) == 7
            assert has_ended.is_set()
            lanes.close(KeyError())

        run_async(test())

    def test_a_stop_at_any_moment_harms_nobody_else(self):
        """Some come before the call, some in it, some when it has just ended."""

        async def test():
            lanes = Lanes()
            for turn in range(300):
                work = partial(sum, range(10 * turn))
                call = asyncio.ensure_future(lanes.run(1, work))
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                call.cancel()
                assert await lanes.run(1, partial(abs, turn)) == turn
            lanes.close(KeyError())

        run_async(test())

    def test_a_stop_leaves_nothing_behind(self):
        """Code that is traced later, in any thread, would hang (Python up to 3.12)."""
        code = """
import asyncio, sys
from mlx_gemma_mtp.server.lanes import Lanes

def endless():
    while True:
        pass

async def stop(lanes):
    running = asyncio.ensure_future(lanes.run(1, endless))
    await asyncio.sleep(0.05)
    running.cancel()
    assert await lanes.run(1, lambda: 7) == 7

asyncio.run(stop(Lanes()))
sys.setprofile(lambda *_: None)
endings = [str(i) for i in range(1000)]
sys.setprofile(None)
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)

    def test_who_waits_when_it_is_closed_is_told(self):
        """Also who waits for what is being called and for what never will be."""

        async def test():
            lanes, may_end = Lanes(), threading.Event()
            calls = [
                asyncio.ensure_future(lanes.run(1, lambda: may_end.wait(WAIT_S)))
                for _ in range(2)
            ]
            await asyncio.sleep(0)
            wait_until(lambda: len(lanes._short._waiting) == 1)
            lanes.close(KeyError("closed"))
            for call in (*calls, lanes.run(1, list)):
                with pytest.raises(KeyError, match="closed"):
                    await call
            may_end.set()

        run_async(test())

    def test_what_nobody_waits_for_is_forgotten(self):
        """At once, not when its turn comes: a text may have megabytes."""

        async def test():
            lanes, may_end = Lanes(), threading.Event()
            first, gone, last = (
                asyncio.ensure_future(lanes.run(1, lambda: may_end.wait(WAIT_S)))
                for _ in range(3)
            )
            await asyncio.sleep(0)
            wait_until(lambda: len(lanes._short._waiting) == 2)
            gone.cancel()
            await asyncio.wait([gone])
            assert len(lanes._short._waiting) == 1
            may_end.set()
            assert await first
            assert await last
            assert await lanes.run(1, lambda: 7) == 7
            lanes.close(KeyError())

        run_async(test())


@pytest.mark.parametrize(
    ("kind", "field", "entry"),
    [
        (CompletionBody, "prompt", 1.5),
        (CompletionBody, "prompt", {}),
        (ChatBody, "messages", {}),
        (ChatBody, "tools", {}),
    ],
)
def test_the_mistakes_of_a_list_are_not_gathered(kind, field, entry):
    """A million of them take a minute in the thread that answers everybody."""
    body = {"prompt": "a", "messages": [{"role": "user"}], field: [entry] * 100}
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert len(error.value.errors()) < 10


@pytest.mark.parametrize("entry", ["", [1]])
def test_no_request_has_a_million_prompts(entry):
    with pytest.raises(ValidationError, match="at most 65536 items"):
        CompletionBody.model_validate({"prompt": [entry] * (2**16 + 1)})


@pytest.mark.parametrize(("size", "count"), [(10**6, 0), (10**6 + 1, 1)])
@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_given_back_behind_a_large_body(size, count, fails):
    given_back: list[bool] = []
    is_over = False

    async def application(_scope, receive, _send):
        nonlocal is_over
        for _ in range(3):
            await receive()
        is_over = True
        if fails:
            raise KeyError("a bug")

    parts = [b"a" * (size // 2), b"a" * (size - size // 2)]
    messages = [{"type": "http.request", "body": part} for part in parts]
    messages.append({"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    async def test():
        tidied = Tidied(application, lambda: given_back.append(is_over))
        with pytest.raises(KeyError) if fails else nullcontext():
            await tidied({"type": "http"}, receive, never)

    run_async(test())
    assert given_back == [True] * count


def test_memory_is_given_back_where_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(tidy, "REST_S", 0.0)

    async def test():
        given_back, may_end = asyncio.Event(), asyncio.Event()

        async def application(_scope, _receive, _send):
            await may_end.wait()

        tidied = Tidied(application, given_back.set)
        first = asyncio.ensure_future(tidied({"type": "http"}, never, never))
        await asyncio.sleep(0)
        may_end.set()
        await tidied({"type": "http"}, never, never)
        assert not given_back.is_set()
        await first
        await given_back.wait()

    run_async(test())


def test_memory_can_be_given_back_on_every_system(monkeypatch):
    memory_returner()()
    monkeypatch.setattr(tidy.ctypes, "CDLL", lambda _: object())  # as on macOS
    memory_returner()()
