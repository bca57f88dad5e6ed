"""The round against scripts: every outcome of drafting, and where a text ends.

Run: python -m pytest tests/engine/test_rounds.py
"""

from __future__ import annotations

from itertools import cycle, pairwise
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.cache import slabs as cache_module
from mlx_gemma_mtp.drafting.policy import DraftPolicy, Way
from mlx_gemma_mtp.engine import capacity as capacity_module
from mlx_gemma_mtp.engine import traces as traces_module
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.sampling.acceptance import accept_equal
from tests.scripted import ScriptedDrafter, ScriptedTarget
from tests.tiny import reference_pair

EOS = 1
PROMPT = [5, 6]
TEXT = [*range(10, 40)]  # what the target says after the prompt


def decode(
    target_scripts, drafter_scripts, *, num_draft_tokens, max_tokens, look_ahead=True
):
    """Decode rows with the prompt PROMPT; emissions by round, and the decoder."""
    rounds = Rounds(
        ScriptedTarget(target_scripts),
        ScriptedDrafter(drafter_scripts),
        use_compile=False,
    )
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens]
    requests = [Request(PROMPT, n, eos_token_ids=frozenset({EOS})) for n in limits]
    decoder = Decoder(
        rounds, requests, num_draft_tokens=num_draft_tokens, look_ahead=look_ahead
    )
    return list(decoder.run()), decoder, rounds.target


def row_tokens(rounds, row=0):
    """All tokens of one row."""
    return [
        token
        for emissions in rounds
        for emission in emissions
        if emission.sequence.index == row
        for token in emission.tokens
    ]


def wrong_at(script, positions):
    """The script with other tokens at these absolute positions."""
    return [63 if i in positions else token for i, token in enumerate(script)]


@pytest.mark.parametrize("num_draft_tokens", range(9))
def test_nothing_accepted(num_draft_tokens):
    script = PROMPT + TEXT
    wrong = wrong_at(script, range(len(script)))
    rounds, decoder, _ = decode(
        [script], [wrong], num_draft_tokens=num_draft_tokens, max_tokens=9
    )
    assert row_tokens(rounds) == TEXT[:9]
    assert [len(r[0].tokens) for r in rounds] == [1] * 9
    assert decoder.stats.accepted == 0
    assert decoder.stats.drafted == 8 * num_draft_tokens


@pytest.mark.parametrize("num_draft_tokens", range(1, 9))
def test_all_accepted(num_draft_tokens):
    block = num_draft_tokens + 1
    script = PROMPT + TEXT
    rounds, decoder, _ = decode(
        [script], [script], num_draft_tokens=num_draft_tokens, max_tokens=1 + 2 * block
    )
    assert row_tokens(rounds) == TEXT[: 1 + 2 * block]
    assert [len(r[0].tokens) for r in rounds] == [1, block, block]
    assert [r[0].num_from_draft for r in rounds] == [0, block - 1, block - 1]
    assert decoder.stats.acceptance_length == block
    assert rounds[-1][0].finish_reason == "length"


@pytest.mark.parametrize("num_accepted", range(5))
def test_first_difference_ends_the_round(num_accepted):
    script = PROMPT + TEXT
    # The prefill emits position 2, so the first round drafts positions 3, 4, 5, 6.
    wrong = wrong_at(script, [3 + num_accepted])
    rounds, _, _ = decode([script], [wrong], num_draft_tokens=4, max_tokens=20)
    assert len(rounds[1][0].tokens) == num_accepted + 1
    assert rounds[1][0].num_from_draft == num_accepted
    assert row_tokens(rounds) == TEXT[:20]


@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("place", range(11))
def test_end_of_sequence_at_every_place_of_a_block(place, look_ahead):
    text = [*TEXT[:place], EOS, *TEXT[place:]]
    script = PROMPT + text
    rounds, _, _ = decode(
        [script], [script], num_draft_tokens=4, max_tokens=25, look_ahead=look_ahead
    )
    assert row_tokens(rounds) == text[: place + 1]
    assert [r[0].finish_reason for r in rounds[:-1]] == [None] * (len(rounds) - 1)
    assert rounds[-1][0].finish_reason == "stop"


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, 8])
@pytest.mark.parametrize("max_tokens", [*range(1, 12)])
def test_budget_is_exact_and_no_round_is_wasted(max_tokens, num_draft_tokens):
    script = PROMPT + TEXT
    rounds, _, target = decode(
        [script], [script], num_draft_tokens=num_draft_tokens, max_tokens=max_tokens
    )
    assert row_tokens(rounds) == TEXT[:max_tokens]
    assert rounds[-1][0].finish_reason == "length"
    needed = -(-(max_tokens - 1) // (num_draft_tokens + 1))
    # Look-ahead queues at most one round more, and none when one token is left.
    assert needed <= len(target.blocks) <= needed + (max_tokens > 2)


def test_budget_of_one_runs_no_round():
    script = PROMPT + TEXT
    rounds, decoder, target = decode(
        [script], [script], num_draft_tokens=4, max_tokens=1
    )
    assert row_tokens(rounds) == TEXT[:1]
    assert target.blocks == []
    assert decoder.stats.rounds == 0


def test_rows_end_at_different_rounds():
    scripts = [
        PROMPT + TEXT,
        PROMPT + TEXT[:3] + [EOS] + TEXT[3:],
        PROMPT + TEXT[::-1],
        PROMPT + TEXT,
    ]
    drafts = [scripts[0], scripts[1], wrong_at(scripts[2], range(40)), scripts[3]]
    limits = [25, 25, 9, 2]
    rounds, _, _ = decode(scripts, drafts, num_draft_tokens=3, max_tokens=limits)
    assert row_tokens(rounds, 0) == TEXT[:25]
    assert row_tokens(rounds, 1) == [*TEXT[:3], EOS]
    assert row_tokens(rounds, 2) == TEXT[::-1][:9]
    assert row_tokens(rounds, 3) == TEXT[:2]
    ends = {
        e.sequence.index: i for i, r in enumerate(rounds) for e in r if e.finish_reason
    }
    assert ends == {0: 6, 1: 1, 2: 8, 3: 1}
    # A row that has ended is never reported again.
    for row, end in ends.items():
        assert all(e.sequence.index != row for r in rounds[end + 1 :] for e in r)


@given(data=st.data())
def test_any_script_any_drafts(data):
    """The text is the target's, whatever is drafted; every draft counts once."""
    tokens = st.integers(min_value=0, max_value=4)
    text = data.draw(st.lists(tokens, min_size=12, max_size=12))
    drafts = data.draw(st.lists(tokens, min_size=12, max_size=12))
    num_draft_tokens = data.draw(st.integers(0, 4))
    max_tokens = data.draw(st.integers(1, 12))
    rounds, decoder, _ = decode(
        [PROMPT + text],
        [PROMPT + drafts],
        num_draft_tokens=num_draft_tokens,
        max_tokens=max_tokens,
        look_ahead=data.draw(st.booleans()),
    )
    expected = text[:max_tokens]
    if EOS in expected:
        expected = expected[: expected.index(EOS) + 1]
    assert row_tokens(rounds) == expected
    # Replay: each round accepts up to the first difference.
    position = 1
    for emissions in rounds[1:]:
        equal = [
            a == b
            for a, b in zip(
                (drafts + [0] * 9)[position : position + num_draft_tokens],
                (text + [0] * 9)[position : position + num_draft_tokens],
                strict=True,
            )
        ]
        num_accepted = equal.index(False) if False in equal else num_draft_tokens
        assert emissions[0].num_from_draft == min(
            num_accepted, len(emissions[0].tokens)
        )
        position += num_accepted + 1
    assert decoder.stats.rounds == len(rounds) - 1
    assert decoder.stats.drafted == num_draft_tokens * (len(rounds) - 1)


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=3, max_size=3),
            st.lists(st.integers(0, 2), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_accept_equal_is_the_longest_common_prefix(rows):
    drafts, targets = (list(side) for side in zip(*rows, strict=True))
    accepted = accept_equal(
        mx.array(drafts, dtype=mx.int32), mx.array(targets, dtype=mx.int32)
    )
    for i, (draft, target) in enumerate(rows):
        length = next((j for j in range(3) if draft[j] != target[j]), 3)
        assert accepted.num_accepted[i].item() == length
        assert accepted.next_token[i, 0].item() == target[length]


def test_finished_rows_are_frozen():
    """A row that has ended keeps its offset and last token while others go on."""
    scripts = [PROMPT + TEXT, PROMPT + TEXT]
    rounds = Rounds(
        ScriptedTarget(scripts), ScriptedDrafter(scripts), use_compile=False
    )
    requests = [Request(PROMPT, n) for n in (3, 28)]
    decoder = Decoder(rounds, requests, num_draft_tokens=2, look_ahead=False)
    offsets: list[Any] = []
    for _ in decoder.run():
        if decoder._batch.state is not None:
            offsets.append(decoder._batch.state.offset.tolist())
    # Row 0 has its 3 tokens after the first round and stays at 5 from then on.
    assert [row for row, _ in offsets] == [2] + [5] * (len(offsets) - 1)
    assert all(b - a == 3 for a, b in pairwise(other for _, other in offsets))


def test_traces_are_let_go_of_when_there_are_too_many(monkeypatch):
    """Each takes memory; a round of a shape that was let go of is traced again."""
    monkeypatch.setattr(traces_module, "MAX_TRACES", 3)
    pair = reference_pair()
    rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
    texts = []
    for count in (0, 1, 2, 3, 4, 0):
        decoder = Decoder(rounds, [Request([2, 5, 9], 8)], num_draft_tokens=count)
        texts.append([t for r in decoder.run() for e in r for t in e.tokens])
        assert len(rounds._traces) <= 3
    assert all(text == texts[0] for text in texts)


class Alternating(DraftPolicy):
    """Drafts in every other round."""

    def __init__(self):
        super().__init__(0)
        self._wanted = cycle((0, 2))

    def choose(self, allowed, **_):
        wanted = next(self._wanted)
        return Way(max(k for k in allowed if k <= wanted))


def test_growth_lets_go_of_no_trace_in_use(monkeypatch):
    """Each number of slots has traces of its own; those of fewer slots go first."""
    monkeypatch.setattr(traces_module, "MAX_TRACES", 4)
    monkeypatch.setattr(cache_module, "CAPACITY_BLOCK", 32)
    monkeypatch.setattr(capacity_module, "slots_ahead", lambda: 8)
    pair, used = reference_pair(), []
    run = Rounds.run

    def noted_run(self, state, *args, num_draft_tokens, **kwargs):
        used.append((num_draft_tokens, self.target.layout.capacity(state.slabs)))
        kwargs["num_draft_tokens"] = num_draft_tokens
        return run(self, state, *args, **kwargs)

    monkeypatch.setattr(Rounds, "run", noted_run)
    rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
    request = Request([2, 5, 9], 150)
    decoder = Decoder(rounds, [request], num_draft_tokens=Alternating())
    for _ in decoder.run():
        pass
    assert len({num_slots for _, num_slots in used}) > 3
    assert decoder.stats.traced == len(set(used)) > 4
