"""The engine's thread: who is decoded when, and who ends how.

Run: python -m pytest tests/server/test_worker.py
"""

from __future__ import annotations

import threading
import time

import pytest

from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.server.bridge import Drain
from mlx_gemma_mtp.server.choice import Choice, Piece, Place
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.prompts import MIN_TOKENS
from mlx_gemma_mtp.server.reply import Reply
from tests.server.serving import (
    EOS,
    ScriptedDecoder,
    echo,
    make_scripted_request,
    run_async,
    scripted_means,
    tokenizer,
    tokens_of,
    wait_until,
    working,
)


def order_of(text="a b c", max_tokens=8, **fields):
    return Choice([2, *tokens_of(text)], max_tokens, **fields)


async def read(reply):
    """Everything that comes of a reply: the pieces of each choice."""
    found: list[list[Piece]] = [[] for _ in reply.jobs]
    while pieces := await reply.pieces():
        for index, piece in pieces:
            found[index].append(piece)
    return found


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def answer_text(choice, count):
    return tokenizer().decode(echo(choice.prompt)[:count])


class Case:
    """A worker with a scripted decoder, and replies that are read to their ends."""

    def __init__(self, parts, decoder):
        self.parts = parts
        self.bridge = parts.bridge
        self.decoder = decoder

    def submit(self, *choices):
        reply = Reply(choices, time.perf_counter())
        self.bridge.submit(reply)
        return reply

    def start(self):
        self.parts.thread.start()


def run(test, *, decoder=None, starts=True, **fields):
    """Run a test's coroutine with a working worker."""
    decoder = decoder or ScriptedDecoder(echo)

    async def attached(parts):
        parts.bridge.attach()
        return await test(Case(parts, decoder))

    with working(scripted_means(decoder, **fields), starts=starts) as parts:
        return run_async(attached(parts))


def test_a_text_comes_in_pieces_of_a_round():
    choice = order_of(max_tokens=8)

    async def test(case):
        reply = case.submit(choice)
        await reply.accepted()
        (pieces,) = await read(reply)
        return pieces

    pieces = run(test)
    assert text_of(pieces) == answer_text(choice, 8)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tokens == echo(choice.prompt)[:8]
    assert pieces[-1].finish_reason == "length"
    tally = pieces[-1].tally
    assert (tally.rounds, tally.drafted, tally.accepted) == (3, 9, 5)
    assert tally.num_from_draft == 5


def test_an_end_of_sequence_token_has_no_text():
    choice = order_of()
    decoder = ScriptedDecoder(lambda prompt: [*prompt[1:4], EOS, 9, 9])

    async def test(case):
        return (await read(case.submit(choice)))[0]

    pieces = run(test, decoder=decoder)
    assert text_of(pieces) == tokenizer().decode(choice.prompt[1:4])
    assert pieces[-1].tokens[-1] == EOS
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("block", [1, 2, 5])
def test_a_stop_string_across_tokens_ends_the_row(block):
    text = "def f(x):\n    return x + 1\n"
    stop = "rn x +"
    assert not any(stop in tokenizer().decode([t]) for t in tokens_of(text))
    decoder = ScriptedDecoder(lambda _: tokens_of(text) * 3, block=block)

    async def test(case):
        pieces = (await read(case.submit(order_of(max_tokens=40, stop=(stop,)))))[0]
        return pieces, case.parts.bridge.num_open

    pieces, num_open = run(test, decoder=decoder)
    assert text_of(pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert len(decoder.removed) == 1
    assert num_open == 0
    # Tokens are counted up to the one that completes the stop string.
    counted = sum(len(piece.tokens) for piece in pieces)
    shown = tokenizer().decode(tokens_of(text)[:counted])
    assert stop in shown
    assert stop not in tokenizer().decode(tokens_of(text)[: counted - 1])


def test_choices_of_one_reply_and_of_others_do_not_mix():
    choices = [order_of(text, max_tokens=n) for text, n in (("a", 3), ("b c", 7))]

    async def test(case):
        replies = [
            case.submit(*choices),
            case.submit(choices[1]),
            case.submit(*choices),
        ]
        return [await read(reply) for reply in replies]

    expected = [answer_text(choice, choice.max_tokens) for choice in choices]
    found = [[text_of(pieces) for pieces in reply] for reply in run(test)]
    assert found == [expected, expected[1:], expected]


def stepping(**settings):
    """A decoder whose steps are allowed one by one."""
    decoder = ScriptedDecoder(echo, **settings)
    decoder.allowed = threading.Semaphore(0)
    return decoder


def allow(decoder, count=1):
    """Let some steps run, and wait until the next one would."""
    wanted = decoder.steps + count
    decoder.allowed.release(count)
    wait_until(lambda: decoder.asked > wanted)


def test_a_cancelled_row_has_no_further_round():
    decoder = stepping()

    async def test(case):
        gone, stays = (case.submit(order_of(t, max_tokens=50)) for t in ("a", "b"))
        case.start()
        allow(decoder, 3)
        (row, _) = decoder._live
        # The step under way may still emit for it; the next one must not.
        case.bridge.cancel(gone.jobs)
        allow(decoder, 2)
        emitted = row.num_emitted
        assert decoder.removed == [row]
        decoder.allowed.release(1000)
        pieces = (await read(stays))[0]
        assert row.num_emitted == emitted
        return pieces

    pieces = run(test, decoder=decoder, starts=False)
    assert text_of(pieces) == answer_text(order_of("b"), 50)


def test_a_cancelled_order_that_waits_is_forgotten():
    decoder = stepping(max_rows=1)

    async def test(case):
        replies = [case.submit(order_of(str(i), max_tokens=6)) for i in range(9)]
        case.start()
        for reply in replies:
            await reply.accepted()
        case.bridge.cancel(replies[8].jobs)
        case.bridge.cancel(replies[1].jobs)
        decoder.allowed.release(1000)
        for i in (0, 2, 7):
            (pieces,) = await read(replies[i])
            assert text_of(pieces) == answer_text(order_of(str(i)), 6)
        wait_until(lambda: case.bridge.num_open == 0)

    run(test, decoder=decoder, starts=False)
    assert len(decoder.added) in (7, 8)  # the second may have been there already


def test_orders_are_given_to_the_decoder_as_it_has_rows_for_them():
    decoder = stepping(max_rows=2)

    async def test(case):
        replies = [case.submit(order_of(str(i), max_tokens=3)) for i in range(9)]
        case.start()
        allow(decoder)
        assert len(decoder.added) == 4
        decoder.allowed.release(1000)
        for reply in replies:
            await read(reply)

    run(test, decoder=decoder, starts=False, max_rows=2)
    assert [request.prompt for request, _ in decoder.added] == [
        order_of(str(i)).prompt for i in range(9)
    ]


def test_an_order_that_cannot_be_decoded_fails_alone():
    def make(choice):
        if choice.max_tokens == 5:
            raise KeyError("a bug")
        return make_scripted_request(choice)

    async def test(case):
        too_long = case.submit(order_of(max_tokens=999))
        wrong = case.submit(order_of(max_tokens=5), order_of())
        good = case.submit(order_of())
        with pytest.raises(AnswerError, match="must fit: got 999") as refused:
            await read(too_long)
        assert refused.value.status == 400
        with pytest.raises(AnswerError, match="log says why") as failed:
            await wrong.accepted()
        assert failed.value.status == 500
        assert text_of((await read(good))[0]) == answer_text(order_of(), 8)
        wait_until(lambda: case.bridge.num_open == 0)

    run(test, make_request=make)


def test_a_rows_own_error_ends_that_row_only():
    decoder = ScriptedDecoder(echo)
    bad = order_of("x y z")
    decoder.row_errors[tuple(bad.prompt)] = ValueError("a processor's")

    async def test(case):
        failing, good = case.submit(bad), case.submit(order_of())
        with pytest.raises(AnswerError, match="log says why"):
            await read(failing)
        return text_of((await read(good))[0])

    assert run(test, decoder=decoder) == answer_text(order_of(), 8)


def test_a_broken_decoder_ends_everything():
    decoder = stepping()

    async def test(case):
        replies = [case.submit(order_of(str(i), max_tokens=50)) for i in range(6)]
        case.start()
        allow(decoder, 3)
        decoder.error = RuntimeError("out of memory")
        decoder.allowed.release(1000)
        for reply in replies:
            with pytest.raises(AnswerError, match="engine has failed") as failed:
                await read(reply)
            assert failed.value.status == 500
        assert case.bridge.status == "failed"
        with pytest.raises(AnswerError) as refused:
            case.submit(order_of())
        assert refused.value.status == 503
        assert case.bridge.num_open == 0

    run(test, decoder=decoder, starts=False)
    assert not decoder.is_closed  # nothing more is asked of it


def test_a_decoder_that_cannot_let_go_is_broken_too(monkeypatch):
    decoder = stepping()

    async def test(case):
        gone, stays = (case.submit(order_of(t, max_tokens=50)) for t in ("a", "b"))
        case.start()
        allow(decoder, 3)
        monkeypatch.setattr(decoder, "remove", None)
        case.bridge.cancel(gone.jobs)
        late = case.submit(order_of("c"))  # in the mailbox behind it
        decoder.allowed.release(1000)
        for reply in (stays, late):
            with pytest.raises(AnswerError):
                await read(reply)
        assert case.bridge.status == "failed"

    run(test, decoder=decoder, starts=False)


def test_draining_finishes_what_there_is():
    decoder = stepping(max_rows=1)

    async def test(case):
        replies = [case.submit(order_of(str(i), max_tokens=6)) for i in range(5)]
        case.start()
        for reply in replies:
            await reply.accepted()
        case.bridge.is_draining = True
        case.parts.mailbox.put(Drain(1000.0))
        with pytest.raises(AnswerError, match="shutting down") as refused:
            case.submit(order_of())
        assert refused.value.status == 503
        decoder.allowed.release(1000)
        texts = [text_of((await read(reply))[0]) for reply in replies]
        case.parts.thread.join(30)
        return texts

    assert run(test, decoder=decoder, starts=False) == [
        answer_text(order_of(str(i)), 6) for i in range(5)
    ]
    assert decoder.is_closed


def test_draining_ends_at_its_deadline():
    decoder = stepping()

    async def test(case):
        reply = case.submit(order_of(max_tokens=50))
        await reply.accepted()
        allow(decoder, 2)
        case.parts.mailbox.put(Drain(0.0))
        decoder.allowed.release(1000)
        with pytest.raises(AnswerError, match="shutting down") as ended:
            await read(reply)
        assert ended.value.status == 503

    run(test, decoder=decoder)
    assert decoder.is_closed


def test_nothing_runs_while_there_is_nothing_to_do():
    decoder = ScriptedDecoder(echo)

    async def test(case):
        await read(case.submit(order_of()))
        wait_until(lambda: case.bridge.num_open == 0)
        steps = decoder.steps
        time.sleep(0.05)
        assert decoder.steps == steps
        return steps

    assert run(test, decoder=decoder) == 4  # one reads the prompt


def test_how_much_of_all_prompts_is_read():
    """Of 6 and 5 tokens, 4 in a step; nothing wakes who waits for the answer."""
    decoder = stepping(chunk=4)
    choices = order_of("a b c d e"), order_of("f g h i")

    async def test(case):
        reply = case.submit(*choices)
        case.start()
        await reply.accepted()
        found = []
        for steps in (0, 1, 1):
            if steps:
                allow(decoder, steps)
            assert await reply.pieces(0.01) == []
            found.append(reply.num_read)
        decoder.allowed.release(1000)
        await read(reply)
        return [*found, reply.num_read, reply.num_to_read]

    assert run(test, decoder=decoder, starts=False) == [0, 4, 6, 11, 11]


class TestKeptCaches:
    """Prompts are long enough to be kept, and longer than the window of 16."""

    prompt = (2, *range(100, 100 + 2 * MIN_TOKENS))

    def choice(self, *more, **fields):
        places = (Place(MIN_TOKENS, "system"), Place(len(self.prompt) - 1, "user"))
        return Choice([*self.prompt, *more], 6, places=places, **fields)

    def run(self, choices, **fields):
        decoder = ScriptedDecoder(echo)
        kept = KeptCaches(max_size=10, max_bytes=10**9, min_tokens=MIN_TOKENS)
        self.num_read: list[int] = []

        async def test(case):
            found = []
            for choice in choices:
                reply = case.submit(choice)
                pieces = (await read(reply))[0]
                wait_until(lambda: case.bridge.num_open == 0)
                self.num_read.append(reply.num_read)
                found.append((text_of(pieces), pieces[-1].tally.num_cached))
            return found

        found = run(test, decoder=decoder, kept=kept, **fields)
        return found, decoder, kept

    def test_a_prompt_that_is_known_is_not_read_again(self):
        choice = self.choice()
        found, decoder, _ = self.run([choice, choice])
        text = answer_text(choice, 6)
        assert found == [(text, 0), (text, len(choice.prompt) - 1)]
        assert self.num_read == [len(choice.prompt)] * 2
        (first, no_caches), (second, caches) = decoder.added
        assert no_caches is None
        assert first.pauses == (MIN_TOKENS, len(choice.prompt) - 1)
        assert second.pauses == ()
        assert second.prompt == choice.prompt[-1:]
        assert second.history == tuple(choice.prompt[:-1])
        assert caches[0].tokens == choice.prompt[:-1]

    def test_a_conversation_goes_on_where_the_answer_ended(self):
        first = self.choice()
        answer = echo(first.prompt)[:6]
        found, _, _ = self.run([first, self.choice(*answer, 7)])
        # All but the answer's last token, whose keys were not there.
        assert found[1][1] == len(first.prompt) + 5

    def test_the_instructions_are_kept_by_themselves(self):
        other = [*self.prompt[: MIN_TOKENS + 3], *range(500, 600)]
        place = Place(MIN_TOKENS, "system")
        found, _, _ = self.run([self.choice(), Choice(other, 6, places=(place,))])
        assert found[1][1] == MIN_TOKENS

    def test_a_short_text_needs_no_pause(self):
        _, decoder, kept = self.run([self.choice()], window=1000)
        assert decoder.added[0][0].pauses == ()
        assert len(kept) == 1  # the answer's, which can be cut

    def test_the_budget_is_kept(self):
        most = 10 * 3 * MIN_TOKENS
        kept = KeptCaches(max_size=10, max_bytes=most, min_tokens=MIN_TOKENS)
        choices = [
            Choice([2, *range(i, i + 2 * MIN_TOKENS)], 4) for i in range(100, 109)
        ]
        decoder = ScriptedDecoder(echo)

        async def test(case):
            for choice in choices:
                await read(case.submit(choice))

        run(test, decoder=decoder, kept=kept)
        assert kept.num_bytes <= most
        assert len(kept) == 1

    def test_caches_that_cannot_be_had_fail_nobody(self, monkeypatch):
        decoder = ScriptedDecoder(echo)
        monkeypatch.setattr(decoder, "extract", None)
        choice = self.choice()
        kept = KeptCaches(max_size=10, max_bytes=10**9, min_tokens=MIN_TOKENS)

        async def test(case):
            return text_of((await read(case.submit(choice)))[0])

        assert run(test, decoder=decoder, kept=kept) == answer_text(choice, 6)
        assert len(kept) == 0
