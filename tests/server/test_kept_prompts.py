"""Prompts that begin like earlier ones: the same text, and only the rest is read.

Run: python -m pytest tests/server/test_kept_prompts.py
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.cache.prompt_folder import PromptFolder
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.choice import Choice
from mlx_gemma_mtp.server.prompts import MIN_TOKENS
from mlx_gemma_mtp.server.reply import Reply
from mlx_gemma_mtp.server.served_model import make_engine
from tests.server.serving import (
    WAIT_S,
    run_async,
    tokenizer,
    wait_until,
    working_engine,
)
from tests.tiny import VOCAB_SIZE, families, reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

INTERVAL = 32  # tokens between two rungs; the window has 16
MAX_TOKENS = 4


def prompt_of(num_tokens, seed):
    """Random tokens that end no text."""
    return random.Random(seed).choices(range(7, VOCAB_SIZE), k=num_tokens)


class Asked:
    """A worker with a pair, asked for one text after another."""

    def __init__(self, parts, wait_s=WAIT_S):
        self._wait_s = wait_s
        self.bridge = parts.bridge
        self._prompts = parts.desk.prompts

    def choice(self, prompt, **fields):
        places = self._prompts.of_tokens(prompt).places
        return Choice(prompt, MAX_TOKENS, places=places, **fields)

    def ask(self, prompt, **fields):
        """The tokens behind a prompt, and how many of its tokens were not read."""

        async def asked():
            self.bridge.attach()
            reply = Reply([self.choice(prompt, **fields)], time.perf_counter())
            self.bridge.submit(reply)
            tokens, tally = [], None
            while pieces := await reply.pieces():
                for _, piece in pieces:
                    tokens += piece.tokens
                    tally = piece.tally
            assert tally is not None
            return tokens, tally.num_cached

        found = asyncio.run(asyncio.wait_for(asked(), self._wait_s))
        wait_until(lambda: self.bridge.num_open == 0)
        return found


@contextlib.contextmanager
def asking(family, kept=None, *, interval=INTERVAL, wait_s=WAIT_S):
    """A worker with a reference pair, which drafts where prompts are kept."""
    given = {
        "prefill-step-size": interval,
        "num-draft-tokens": 0 if kept is None else 3,
    }
    arguments = [text for key, n in given.items() for text in (f"--{key}", str(n))]
    engine = make_engine(parse(arguments), reference_pair(family), tokenizer())
    means = replace(engine.means, kept=kept, rung_interval=interval)
    with working_engine(replace(engine, means=means)) as parts:
        yield Asked(parts, wait_s)


def some(**fields):
    """Caches in memory that hold nothing yet."""
    return KeptCaches(max_size=10, max_bytes=10**9, min_tokens=MIN_TOKENS, **fields)


def some_of(folder, family="e2b"):
    """Those of a new process, which has a folder."""
    layout = reference_pair(family).rounds.target.layout
    sizes = {"max_bytes": 10**9, "max_pending": 10**9, "min_gap": INTERVAL}
    return some(folder=PromptFolder(folder, layout, {"pair": family}, **sizes))


def rung_before(parting):
    return parting // INTERVAL * INTERVAL


@pytest.mark.parametrize("family", families("e2b", "26b-a4b"))
def test_the_text_is_that_without_any_cache(family):
    kept = some()
    with asking(family) as plain, asking(family, kept) as cached:

        @settings(max_examples=3)
        @given(
            st.integers(70, 180), st.integers(1, 60), st.floats(0, 1), st.integers(0)
        )
        def check(num_first, num_more, share, seed):
            kept.clear()
            first = prompt_of(num_first, seed)
            parting = round(share * num_first)
            other = [*first[:parting], *prompt_of(num_more, seed + 1)]
            assert cached.ask(first)[1] == 0
            text, num_cached = cached.ask(other)
            assert text == plain.ask(other)[0]
            common = min(len(other) - 1, parting)
            assert num_cached >= rung_before(min(common, num_first - 1))

        check()


def test_agents_long_instructions_are_read_once():
    """Requests that share nine tenths of what they say, in three lengths."""
    shared = prompt_of(270, 0)
    with asking("e2b", some()) as cached, asking("e2b") as plain:
        for number, length in enumerate((30, 70, 10)):
            prompt = [*shared, *prompt_of(length, number + 1)]
            text, num_cached = cached.ask(prompt)
            assert num_cached == (rung_before(270) if number else 0)
        assert text == plain.ask(prompt)[0]


def test_a_prompt_that_was_let_go_of_leaves_its_rungs():
    """Who gives up while a prompt is read asks again: what was read serves."""
    prompt, kept = prompt_of(300, 3), some()
    with asking("e2b", kept) as cached:

        async def begun():
            cached.bridge.attach()
            reply = Reply([cached.choice(prompt)], time.perf_counter())
            cached.bridge.submit(reply)
            await reply.accepted()
            wait_until(lambda: len(kept))
            cached.bridge.cancel(reply.jobs)

        run_async(begun())
        wait_until(lambda: cached.bridge.num_open == 0)
        _, num_cached = cached.ask(prompt)
        assert num_cached in range(INTERVAL, 300, INTERVAL)


def test_the_text_is_the_same_where_memory_is_short():
    prompts = [prompt_of(200, 7)]
    prompts += [[*prompts[0][:n], *prompt_of(20, n)] for n in (170, 60, 167)]
    with asking("12b") as plain, asking("12b", kept := some()) as cached:
        first = cached.ask(prompts[0])[0]
        assert first == plain.ask(prompts[0])[0]
        kept._max_bytes = kept.num_bytes
        held = []
        for prompt in prompts[1:]:
            text, num_cached = cached.ask(prompt)
            held.append(num_cached)
            assert text == plain.ask(prompt)[0]
            assert kept.num_bytes <= kept._max_bytes
        assert held == [160, 0, 160]  # what is far from the end goes first


def test_salts_share_no_rungs():
    prompt = prompt_of(150, 5)
    with asking("e2b", some()) as cached:
        other = [*prompt[:100], *prompt_of(30, 6)]
        cached.ask(prompt, cache_salt="a")
        assert cached.ask(other)[1] == 0
        assert cached.ask(other, cache_salt="b")[1] == 0
        assert cached.ask(other, cache_salt="a")[1] == rung_before(100)


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_a_server_that_was_started_again_goes_on(tmp_path, family):
    prompt = prompt_of(200, 8)
    with asking(family, some_of(tmp_path, family)) as first:
        answer, _ = first.ask(prompt)
    other = [*prompt[:150], *prompt_of(30, 9)]
    longer = [*prompt, *answer, *prompt_of(10, 10)]
    with asking(family) as plain:
        expected = [plain.ask(text)[0] for text in (other, longer)]
    kept = some_of(tmp_path, family)
    with asking(family, kept) as second:
        assert second.ask(other) == (expected[0], rung_before(150))
        text, num_cached = second.ask(longer)
        assert text == expected[1]
        assert num_cached >= rung_before(len(prompt))
    with asking(family, some_of(tmp_path, family)) as third:
        assert third.ask(other, cache_salt="a")[1] == 0


def test_a_restarted_server_reads_no_damaged_file(tmp_path):
    prompt = prompt_of(200, 8)
    with asking("e2b", some_of(tmp_path)) as first:
        text, _ = first.ask(prompt)
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1  # a value of a sliding window
        file.write_bytes(data)
    with asking("e2b", some_of(tmp_path)) as second:
        assert second.ask(prompt) == (text, 0)


@pytest.mark.slow
def test_of_twenty_thousand_tokens_what_is_shared_is_not_read_again(tmp_path):
    """18,000 are shared, with a prompt in memory and with one in a folder."""
    interval, shared = 1024, prompt_of(18_000, 0)
    how = {"interval": interval, "wait_s": 3000}
    first, second, third = ([*shared, *prompt_of(2_000, n)] for n in (1, 2, 3))
    with asking("e2b", **how) as plain:
        expected, _ = plain.ask(third)
    with asking("e2b", some_of(tmp_path), **how) as cached:
        assert cached.ask(first)[1] == 0
        assert 20_000 - cached.ask(second)[1] <= 2_000 + interval
    with asking("e2b", some_of(tmp_path), **how) as cached:
        text, num_cached = cached.ask(third)
    assert 20_000 - num_cached <= 2_000 + interval
    assert text == expected


def test_the_commands_folder_is_used_by_its_model_alone(tmp_path):
    prompt, cached = prompt_of(520, 0), []
    folder = ("--prompt-cache-dir", str(tmp_path))
    for family in ("e2b", "e4b", "e2b"):
        settings = parse([*folder, "--num-draft-tokens", "0"])
        engine = make_engine(settings, reference_pair(family), tokenizer())
        with working_engine(engine) as parts:
            cached.append(Asked(parts).ask(prompt)[1])
    assert cached == [0, 0, 519]
