"""Drafts made beside plain rounds tell what rounds with drafts would accept.

Run: python -m pytest tests/engine/test_shadows.py
"""

from __future__ import annotations

from functools import cache
from weakref import ref

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_gemma_mtp.drafting.policy import DraftPolicy
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.embedded import PROMPTS
from tests.scripted import ChainDrafter, ChainTarget

pytestmark = pytest.mark.usefixtures("plain_graphs")

DEPTH = 4
SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temp=0.8, top_k=40, seed=7),
    "block": SamplingParams(temp=0.8, top_k=40, seed=7, reproducible=False),
}


@cache
def pair():
    return load_pair()


@cache
def prompts_of(count):
    tokenizer = load_tokenizer(embedded_pair_path())
    return [tokenizer.encode(text) for text in PROMPTS[:count]]


class Watcher(DraftPolicy):
    """Asks for drafts beside every plain round, or for rounds of drafts."""

    def __init__(self, num_draft_tokens, num_shadow_drafts=0):
        super().__init__(num_draft_tokens)
        self.num_shadow_drafts = num_shadow_drafts
        self.shadows = []
        self.rounds = []
        self.could_shadow = []

    def choose(self, allowed, *, can_shadow=False, **rest):
        self.could_shadow.append(can_shadow)
        return super().choose(allowed, **rest)

    def observe(self, way, accepted, seconds, *, context=0, **rest):
        self.rounds.append(list(accepted))

    def observe_shadow(self, num_draft_tokens, accepted):
        assert num_draft_tokens == DEPTH
        self.shadows.append(list(accepted))


def decoded(watcher, prompts, sampling, *, look_ahead=True, max_tokens=32):
    requests = [Request(p, max_tokens, sampling) for p in prompts]
    decoder = Decoder(
        pair().rounds,
        requests,
        num_draft_tokens=watcher,
        look_ahead=look_ahead,
    )
    texts: list[list[int]] = [[] for _ in prompts]
    for emissions in decoder.run():
        for emission in emissions:
            texts[emission.sequence.index] += emission.tokens
    return texts


@cache
def drafted_rounds(name):
    """Texts of rounds of drafts, and what each has accepted."""
    drafted = Watcher(DEPTH)
    return decoded(drafted, prompts_of(1), SAMPLINGS[name]), drafted.rounds


@pytest.mark.parametrize(
    ("name", "look_ahead"),
    [
        ("greedy", True),
        ("coupled", True),
        pytest.param("greedy", False, marks=pytest.mark.slow),
    ],
)
def test_shadows_say_what_rounds_accept(name, look_ahead):
    """Where a round of drafts began, the shadow of that place said its count."""
    sampling = SAMPLINGS[name]
    plain = Watcher(0, DEPTH)
    texts, rounds = drafted_rounds(name)
    assert decoded(plain, prompts_of(1), sampling, look_ahead=look_ahead) == texts
    # A shadow per plain round, but for those whose last tokens never came.
    told = [count for shadow in plain.shadows for count in shadow]
    count = len(texts[0]) - 2 * DEPTH
    assert len(told) >= count
    told = told[:count]
    assert sum(told) > 12
    place = 0
    for (count,) in rounds:
        if place >= len(told):
            break
        assert told[place] == count
        place += 1 + count


def test_drawn_rows_keep_their_text_and_are_compared_under_shared_noise():
    plain, drawn, coupled = Watcher(0), Watcher(0, DEPTH), Watcher(0, DEPTH)
    text = decoded(plain, prompts_of(1), SAMPLINGS["block"], max_tokens=16)
    for watcher, name in ((drawn, "block"), (coupled, "coupled")):
        found = decoded(watcher, prompts_of(1), SAMPLINGS[name], max_tokens=16)
        assert found == text
    assert drawn.shadows == coupled.shadows


def test_rows_that_end_or_take_few_drafts_say_nothing_wrong():
    sampling = SAMPLINGS["greedy"]
    watcher = Watcher(0, DEPTH)
    first, second = prompts_of(2)
    requests = [
        Request(first, 7, sampling),
        Request(second, 20, sampling, max_draft_tokens=DEPTH - 1),
        Request(first, 20, sampling),
    ]
    decoder = Decoder(pair().rounds, requests, num_draft_tokens=watcher)
    for _ in decoder.run():
        pass
    alone = Watcher(0, DEPTH)
    decoded(alone, prompts_of(1), sampling, max_tokens=20)
    told = [shadow[-1] for shadow in watcher.shadows if shadow]
    said = [count for shadow in alone.shadows for count in shadow][: 20 - 2 * DEPTH]
    assert told[: len(said)] == said
    assert max(map(len, watcher.shadows)) == 3  # its text is compared all the same


def test_rows_that_take_fewer_drafts_than_are_made_beside_them_teach():
    watcher = Watcher(0, DEPTH)
    sampling = SAMPLINGS["greedy"]
    request = Request(prompts_of(1)[0], 20, sampling, max_draft_tokens=1)
    for _ in Decoder(pair().rounds, [request], num_draft_tokens=watcher).run():
        pass
    assert any(watcher.shadows)


def test_no_shadow_where_places_are_unknown():
    drafted = Watcher(DEPTH)
    decoded(drafted, prompts_of(1), SAMPLINGS["greedy"])
    assert drafted.could_shadow[0]
    assert not any(drafted.could_shadow[1:-1])


def joining(watcher):
    """A decoder of chains that rows join; drafts of even tokens are always right."""
    rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
    return Decoder(rounds, num_draft_tokens=watcher)


def test_a_row_that_joins_beside_a_round_in_flight():
    """That round brings it no token."""
    watcher = Watcher(0, DEPTH)
    decoder = joining(watcher)
    for _ in range(3):
        decoder.add(Request([4], 20))
        for _ in range(4):
            decoder.step()
    while not decoder.is_idle:
        decoder.step()
    assert max(map(len, watcher.shadows)) > 1
    assert {count for shadow in watcher.shadows for count in shadow} == {DEPTH}


@pytest.mark.parametrize("how", ["removed", "failed"])
def test_drafts_of_rows_that_are_gone_are_let_go_of(how, monkeypatch):
    """Their tokens do not come; and drafts may have failed with their round."""
    watcher = Watcher(0, DEPTH)
    decoder = joining(watcher)
    row = decoder.add(Request([4], 20))
    for _ in range(3):
        decoder.step()
    num_waiting = len(watcher.could_shadow) - len(watcher.shadows)
    assert num_waiting > 1
    if how == "removed":
        decoder.remove(row)
    else:
        monkeypatch.setattr(Rounds, "draft", fails)
        decoder.step()
        assert row.finish_reason == "error"
        num_waiting += 1  # what has failed
    # Who has asked is told that nothing comes.
    assert watcher.shadows[-num_waiting:] == [[]] * num_waiting


def fails(*args, **kwargs):
    raise RuntimeError("no memory")


def test_a_decoder_that_rests_holds_no_row():
    decoder = joining(Watcher(0, DEPTH))
    row = decoder.add(Request([4], 20))
    for _ in range(3):
        decoder.step()
    decoder.remove(row)
    reference = ref(row)
    del row
    assert reference() is None


def test_no_shadow_where_no_row_would_say_anything():
    watcher = Watcher(0)
    decoder = joining(watcher)
    decoder.add(Request([4], 10, max_draft_tokens=0))
    for _ in range(3):
        decoder.step()
    assert not any(watcher.could_shadow)
    decoder.add(Request([4], 3))
    while not decoder.is_idle:
        decoder.step()
    assert any(watcher.could_shadow)
    assert not watcher.could_shadow[-1]
