"""Token ids in, token ids out: shapes of results, budgets, ends, mistakes.

Run: python -m pytest tests/generation/test_tokens.py
"""

from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation import tokens as tokens_module
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling import distribution, graph
from tests.tiny import (
    END_OF_TURN,
    EOS,
    SHORT,
    VOCAB_SIZE,
    record_decoders,
    reference_pair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 5, 9, 11]
OTHER = [7, 300, 8]
# Noise outweighs the logits of a random pair, so that its drafts are accepted.
SAMPLED: dict[str, Any] = {"temp": 2.0, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def _every_token_is_a_candidate():
    """A random pair agrees on 64 of 512 tokens too rarely to test what follows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (distribution, graph):
            patch.setattr(module, "MAX_CANDIDATES", VOCAB_SIZE)
        yield


@pytest.fixture(scope="module")
def pair():
    return reference_pair()


@pytest.fixture(scope="module")
def plain_pair():
    return reference_pair(has_drafter=False)


@pytest.fixture(scope="module")
def expected(pair):
    """The greedy text by plain decoding, past any end."""
    return run(pair, PROMPT, max_tokens=16, num_draft_tokens=0, eos_token_ids=())


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that the calls of a test make."""
    return record_decoders(monkeypatch, tokens_module)


def run(pair, prompt, **settings):
    return list(generate_tokens(pair, prompt, **settings))


def column(rows, i):
    """One prompt's tokens, and how many rows follow its end."""
    tokens = [row[i] for row in rows]
    kept = [token for token in tokens if token is not None]
    assert tokens[: len(kept)] == kept, "None comes only after a row's end"
    return kept, len(tokens) - len(kept)


def test_one_prompt_gives_ints(expected):
    assert len(expected) == 16
    assert all(type(token) is int for token in expected)
    assert all(0 <= token < VOCAB_SIZE for token in expected)


def test_several_prompts_give_lists(pair):
    settings: dict[str, Any] = {**SAMPLED, "max_tokens": 20}
    singles = [
        run(pair, prompt, num_draft_tokens=0, eos_token_ids=(), **settings)
        for prompt in (PROMPT, OTHER)
    ]
    rows = run(pair, [PROMPT, OTHER], num_draft_tokens=4, eos_token_ids=(), **settings)
    assert all(type(row) is list and len(row) == 2 for row in rows)
    assert [column(rows, i) for i in range(2)] == [(singles[0], 0), (singles[1], 0)]
    # An end that one row meets in the middle.
    place = next(i for i in range(4, 20) if singles[0][i] not in singles[1])
    num_tokens = singles[0].index(singles[0][place]) + 1
    rows = run(
        pair,
        [PROMPT, OTHER],
        num_draft_tokens=4,
        eos_token_ids=[singles[0][place]],
        **settings,
    )
    assert column(rows, 0) == (singles[0][:num_tokens], 20 - num_tokens)
    assert column(rows, 1) == (singles[1], 0)


def test_a_batch_of_one_is_a_batch(pair, expected):
    rows = run(pair, [PROMPT], max_tokens=3, num_draft_tokens=0, eos_token_ids=())
    assert rows == [[token] for token in expected[:3]]


@pytest.mark.parametrize(
    ("max_tokens", "num_draft_tokens"), [(1, 0), (2, 0), (1, 4), (2, 4), (5, 4)]
)
def test_max_tokens_is_exact(pair, expected, max_tokens, num_draft_tokens):
    settings = {"max_tokens": max_tokens, "num_draft_tokens": num_draft_tokens}
    greedy = run(pair, PROMPT, eos_token_ids=(), **settings)
    assert greedy == expected[:max_tokens]
    # Accepted drafts beyond the budget are cut, too.
    assert len(run(pair, PROMPT, eos_token_ids=(), **SAMPLED, **settings)) == max_tokens


def test_drafts_are_accepted_and_cut(pair, decoders):
    settings = {"num_draft_tokens": 3, **SAMPLED}
    tokens = run(pair, PROMPT, max_tokens=20, eos_token_ids=(), **settings)
    (decoder,) = decoders
    assert len(tokens) == 20
    assert decoder.stats.accepted > decoder.stats.rounds  # or the tests above are idle


def test_xtc(pair):
    """At a threshold of 0 only the least likely token is left, or a special one."""
    settings = {"max_tokens": 8, "eos_token_ids": (), **SAMPLED}
    strikes = {"xtc_probability": 1.0, "xtc_threshold": 0.0}
    plain = run(pair, PROMPT, **settings)
    assert run(pair, PROMPT, **settings, xtc_threshold=0.0) == plain
    assert run(pair, PROMPT, **settings, **strikes) != plain
    special = list(range(VOCAB_SIZE))
    assert run(pair, PROMPT, **settings, **strikes, xtc_special_tokens=special) == plain


@pytest.mark.parametrize("settings", [{}, {"num_draft_tokens": "auto"}])
def test_the_controller_chooses_by_default(
    pair, plain_pair, decoders, monkeypatch, settings
):
    chosen = []
    choose = DraftLengthController.choose
    choose_lookup = DraftLengthController.choose_lookup

    def noted(self, **given):
        chosen.append(choose(self, **given))
        return chosen[-1]

    def noted_lookup(self, lengths, **given):
        if count := choose_lookup(self, lengths, **given):
            chosen.append(count)
        return count

    monkeypatch.setattr(DraftLengthController, "choose", noted)
    monkeypatch.setattr(DraftLengthController, "choose_lookup", noted_lookup)
    for p in (pair, plain_pair):
        run(p, PROMPT, max_tokens=30, eos_token_ids=(), **settings)
    drafted, plain = decoders
    assert drafted.stats.rounds <= len(chosen) <= drafted.stats.rounds + 1
    assert set(plain.stats.num_draft_tokens) == {0}
    assert plain.stats.why_not_engaged.startswith("no drafter")


@pytest.mark.parametrize(
    ("named", "used"), [(None, 4), (1, 1), (8, 8), (20, 4), (0, 4)]
)
def test_number_of_drafts_that_a_checkpoint_names(pair, named, used):
    drafter = Drafter(replace(pair.drafter.config, num_assistant_tokens=named))
    assert Pair(pair.target, drafter).num_draft_tokens == used


def test_no_limit(pair, expected):
    stream = generate_tokens(
        pair, PROMPT, max_tokens=-1, num_draft_tokens=4, eos_token_ids=()
    )
    tokens = list(islice(stream, 24))
    stream.close()
    assert tokens[:16] == expected
    assert len(tokens) == 24


class TestEnds:
    def test_the_ending_token_is_yielded(self, pair, expected):
        for num_draft_tokens in (0, 4):
            found = run(
                pair,
                PROMPT,
                max_tokens=16,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids={expected[6], VOCAB_SIZE - 1},
            )
            assert found == expected[: expected.index(expected[6]) + 1]

    def test_at_the_first_token(self, pair, expected):
        ends = (expected[0],)
        assert run(pair, PROMPT, max_tokens=9, eos_token_ids=ends) == expected[:1]

    def test_inside_a_block(self, pair, decoders):
        settings = {**SAMPLED, "max_tokens": 20, "num_draft_tokens": 4}
        tokens = run(pair, PROMPT, eos_token_ids=(), **settings)
        for i in (1, 3, 4, 6):
            found = run(pair, PROMPT, eos_token_ids=tokens[i : i + 1], **settings)
            assert found == tokens[: tokens.index(tokens[i]) + 1]

    def test_the_checkpoints_own(self, pair, expected, monkeypatch):
        assert pair.eos_token_ids == {EOS, END_OF_TURN}
        assert not {EOS, END_OF_TURN} & set(expected)
        monkeypatch.setattr(pair, "eos_token_ids", frozenset(expected[1:2]))
        settings = {"max_tokens": 6, "num_draft_tokens": 0}
        assert run(pair, PROMPT, **settings) == expected[:2]
        assert run(pair, PROMPT, eos_token_ids=(), **settings) == expected[:6]

    @pytest.mark.parametrize("kind", [list, tuple, set, iter, np.array, mx.array])
    def test_any_collection_of_them(self, pair, expected, kind):
        ends = kind([expected[2]])
        found = run(pair, PROMPT, max_tokens=6, num_draft_tokens=0, eos_token_ids=ends)
        assert found == expected[: expected.index(expected[2]) + 1]


class TestClosing:
    def start(self, pair, prompt):
        return generate_tokens(
            pair, prompt, max_tokens=16, num_draft_tokens=4, eos_token_ids=(), **SAMPLED
        )

    @pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, OTHER]])
    def test_nothing_is_left_running(self, pair, decoders, prompt):
        stream = self.start(pair, prompt)
        first = list(islice(stream, 3))
        (decoder,) = decoders
        assert decoder._batch.state is not None  # it was in the middle of it
        stream.close()
        assert not decoder._pipeline._in_flight
        assert decoder._batch.state is None
        assert list(self.start(pair, prompt))[:3] == first

    def test_two_at_once(self, pair):
        streams = [self.start(pair, PROMPT) for _ in range(2)]
        alone = list(self.start(pair, PROMPT))
        assert list(zip(*streams, strict=True)) == list(zip(alone, alone, strict=True))


class TestPrompts:
    @pytest.mark.parametrize(
        "kind",
        [
            tuple,
            np.array,
            mx.array,
            lambda tokens: list(np.array(tokens)),
            lambda tokens: list(mx.array(tokens)),
            lambda tokens: np.array(tokens, dtype=np.uint16),
        ],
    )
    def test_any_sequence_of_whole_numbers(self, pair, expected, kind):
        settings = {"max_tokens": 3, "num_draft_tokens": 0, "eos_token_ids": ()}
        assert run(pair, kind(PROMPT), **settings) == expected[:3]
        rows = [[token] for token in expected[:3]]
        assert run(pair, [kind(PROMPT)], **settings) == rows
        assert run(pair, kind([PROMPT]), **settings) == rows

    def test_a_range(self, pair):
        settings = {"max_tokens": 3, "num_draft_tokens": 0, "eos_token_ids": ()}
        assert run(pair, range(4, 8), **settings) == run(pair, [4, 5, 6, 7], **settings)

    def test_numbers_may_be_numpys(self, pair, expected):
        limit, drafts = np.int64(3), np.int64(0)
        settings = {"max_tokens": limit, "num_draft_tokens": drafts}
        assert run(pair, PROMPT, eos_token_ids=(), **settings) == expected[:3]

    def test_in_several_forwards(self, pair, expected):
        settings = {"max_tokens": 8, "num_draft_tokens": 0, "eos_token_ids": ()}
        assert run(pair, PROMPT, prefill_step_size=1, **settings) == expected[:8]


MISTAKES = [
    ({"prompt_tokens": []}, "prompt must hold at least one token"),
    ({"prompt_tokens": np.array([], dtype=np.int32)}, "at least one token"),
    ({"prompt_tokens": [PROMPT, []]}, "prompt must hold at least one token"),
    ({"prompt_tokens": [VOCAB_SIZE]}, "got 512, expected 0 to 511"),
    ({"prompt_tokens": [PROMPT, [-1]]}, "got -1, expected 0 to 511"),
    ({"prompt_tokens": [2, 5.0]}, "whole numbers: got 5.0"),
    ({"prompt_tokens": mx.array([2.0, 5.0])}, "whole numbers: got 2.0"),
    ({"prompt_tokens": [2, True]}, "whole numbers: got True"),
    ({"prompt_tokens": [2, "5"]}, "whole numbers: got '5'"),
    ({"prompt_tokens": [2, None]}, "whole numbers: got None"),
    ({"prompt_tokens": [2, [5]]}, r"whole numbers: got \[5\]"),
    ({"prompt_tokens": "hello"}, "sequence of token ids: got 'hello'"),
    ({"prompt_tokens": ["hello"]}, "sequence of token ids: got 'hello'"),
    ({"prompt_tokens": [PROMPT, 5]}, "sequence of token ids: got 5"),
    ({"prompt_tokens": 5}, "sequence of token ids: got 5"),
    ({"prompt_tokens": None}, "sequence of token ids: got None"),
    *(
        ({"max_tokens": value}, "max_tokens must be 1 or more, or -1")
        for value in (0, -2, True, 5.0, "5", None)
    ),
    *(
        (
            {"num_draft_tokens": value},
            "num_draft_tokens must be from 0 to 8, or auto: got",
        )
        for value in (9, -1, True, 4.0, "4")
    ),
    *(
        ({"prefill_step_size": value}, "prefill_step_size must be 1 or more: got")
        for value in (0, -1, 2.0, True, None)
    ),
    *(({"temp": value}, "temp must be") for value in (-0.1, float("nan"), "1", None)),
    *(({"top_p": value}, "top_p must be") for value in (-0.1, 1.1, "1")),
    *(({"top_k": value}, "top_k must be") for value in (-1, 1.5, True)),
    *(({"min_p": value}, "min_p must be") for value in (-0.1, 1.1)),
    ({"xtc_probability": 1.5}, "xtc_probability must be from 0 to 1: got 1.5"),
    ({"xtc_threshold": 0.6}, "xtc_threshold must be from 0 to 0.5: got 0.6"),
    ({"xtc_special_tokens": [-1]}, "xtc_special_tokens must be token ids"),
    ({"xtc_special_tokens": 1}, "must be a sequence of token ids: got 1"),
    *(({"seed": value}, "seed must be") for value in (-1, 2**64, 1.5, "1")),
    *(
        ({"eos_token_ids": value}, "eos_token_ids must be token ids: got")
        for value in (1, "<eos>", [1.0], [None], [True])
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_one_line_at_the_call(pair, changes, message):
    settings = {"prompt_tokens": PROMPT, "max_tokens": 4, **changes}
    with pytest.raises(RequestError, match=message) as caught:
        generate_tokens(pair, **settings)
    assert "\n" not in str(caught.value)


def test_drafts_need_a_drafter(plain_pair):
    with pytest.raises(RequestError, match="must be 0 without a drafter: got 4"):
        generate_tokens(plain_pair, PROMPT, max_tokens=4, num_draft_tokens=4)
    settings = {"max_tokens": 4, "eos_token_ids": ()}
    plain = run(plain_pair, PROMPT, num_draft_tokens=0, **settings)
    assert plain == run(plain_pair, PROMPT, **settings)


class TestDraftBlock:
    def test_one_int_per_draft(self, pair):
        drafts = draft_block(pair, PROMPT, 4)
        assert len(drafts) == 4
        assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in drafts)
        assert draft_block(pair, mx.array(PROMPT), 2) == drafts[:2]

    @pytest.mark.parametrize(
        ("prompt", "number", "message"),
        [
            (PROMPT, 0, "at least 1 for a block of drafts: got 0"),
            (PROMPT, 9, "num_draft_tokens must be from 0 to 8, or auto: got 9"),
            (PROMPT, -1, "num_draft_tokens must be from 0 to 8, or auto: got -1"),
            (PROMPT, True, "num_draft_tokens must be from 0 to 8, or auto: got True"),
            ([], 4, "prompt must hold at least one token"),
            ([2], 4, "at least 2 tokens long for a block of drafts: got 1"),
            ([2, 512], 4, "got 512, expected 0 to 511"),
            ([PROMPT], 4, "whole numbers: got"),
            ("hello", 4, "sequence of token ids: got 'hello'"),
        ],
    )
    def test_mistakes(self, pair, prompt, number, message):
        with pytest.raises(RequestError, match=message) as caught:
            draft_block(pair, prompt, number)
        assert "\n" not in str(caught.value)

    def test_needs_a_drafter(self, plain_pair):
        with pytest.raises(RequestError, match="must be 0 without a drafter: got 4"):
            draft_block(plain_pair, PROMPT, 4)


@pytest.mark.parametrize(
    ("family", "filters"),
    [("e2b", {}), ("e2b", {"top_k": 200, "min_p": 0.01}), (SHORT, {"top_p": 0.9})],
    ids=str,
)
def test_block_verification_of_sparse_and_dense_heads(family, filters):
    """With and without the centroid head; the law is tested elsewhere."""
    pair = reference_pair(family)
    settings = {"temp": 1.0, "seed": 4, "reproducible": False, **filters}
    texts = [
        list(
            generate_tokens(
                pair, PROMPT, max_tokens=8, num_draft_tokens=4, eos_token_ids=(), **s
            )
        )
        for s in (settings, settings, {**settings, "reproducible": True})
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(texts[0]) == 8
    assert all(0 <= token < VOCAB_SIZE for token in texts[0])


def test_without_a_seed_drafts_are_judged_by_block(pair, monkeypatch):
    made = record_decoders(monkeypatch, tokens_module)
    cases: list[dict[str, Any]] = [{}, {"seed": 1}, {"seed": 1, "reproducible": False}]
    for settings in cases:
        list(generate_tokens(pair, PROMPT, max_tokens=3, temp=1.0, **settings))
    graphs = [decoder._batch.settings.graph for decoder in made]
    groups = [group for graph in graphs for group in graph.groups]
    assert [group.has_block for group in groups] == [True, False, True]
    assert [group.has_coupled for group in groups] == [False, True, False]


class TestDraftSource:
    """The same text whatever drafts come from."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "max_tokens": 16,
        "eos_token_ids": (),
        "exactness": "fast",
    }

    @pytest.mark.parametrize("source", ["lookup", "auto"])
    def test_text(self, pair, plain_pair, source):
        for sampling in ({}, {"temp": 0.8, "seed": 5}):
            settings = {**self.SETTINGS, **sampling}
            expected = run(pair, PROMPT, num_draft_tokens=0, **settings)
            settings["draft_source"] = source
            for each, number in ((pair, "auto"), (pair, 8), (plain_pair, None)):
                found = run(each, PROMPT, num_draft_tokens=number, **settings)
                assert found == expected
            rows = run(pair, [PROMPT, PROMPT[:2]], num_draft_tokens=3, **settings)
            assert [row[0] for row in rows] == expected

    def test_without_a_drafter(self, pair, plain_pair, decoders):
        """Only who asks for drafts from the text alone has some."""
        for source, is_drafting in (("auto", False), ("lookup", True)):
            settings = {**self.SETTINGS, "draft_source": source}
            run(plain_pair, PROMPT, **settings)
            stats = decoders[-1].stats
            assert bool(stats.drafted) is is_drafting
            assert stats.why_not_engaged.startswith("no drafter") is not is_drafting
            run(pair, PROMPT, num_draft_tokens=0, **settings)
            assert decoders[-1].stats.why_not_engaged == "num_draft_tokens is 0"

    @pytest.mark.parametrize("source", ["drafter", "auto"])
    def test_a_number_without_a_drafter_is_refused(self, plain_pair, source):
        with pytest.raises(RequestError, match="or set draft_source to lookup"):
            generate_tokens(
                plain_pair,
                PROMPT,
                max_tokens=4,
                num_draft_tokens=8,
                draft_source=source,
            )

    def test_statistics_say_where_drafts_came_from(self, plain_pair, decoders):
        settings = {**self.SETTINGS, "draft_source": "lookup"}
        run(plain_pair, PROMPT, num_draft_tokens=4, **settings)
        found = decoders[-1].stats.to_dict()
        assert found["drafted_from"].keys() == {"lookup"}
        assert found["drafted_from"]["lookup"] == found["drafted"] > 0
        assert found["accepted_from"]["lookup"] == found["accepted"]
        assert decoders[-1].stats.why_not_engaged == ""

    def test_other_words(self, pair):
        with pytest.raises(RequestError, match="auto, drafter or lookup: got 'text'"):
            generate_tokens(pair, PROMPT, max_tokens=4, draft_source="text")
