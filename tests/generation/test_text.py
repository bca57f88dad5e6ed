"""Text in, text out: pieces, figures, ends, log-probabilities, drafters, mistakes.

Run: python -m pytest tests/generation/test_text.py
"""

import dataclasses
import json
import math
from collections import Counter
from itertools import groupby, islice, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.results import SequenceOutput
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.engine.stats import Phases, RoundStats
from mlx_gemma_mtp.errors import PairingError, RequestError
from mlx_gemma_mtp.generation import text as text_module
from mlx_gemma_mtp.generation import tokens as tokens_module
from mlx_gemma_mtp.generation.figures import describe
from mlx_gemma_mtp.generation.response import GenerationResponse
from mlx_gemma_mtp.generation.text import generate, stream_generate
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.load import load
from mlx_gemma_mtp.sampling import distribution, graph
from tests.tiny import (
    BOS,
    END_OF_TURN,
    EOS,
    REFERENCE,
    SHORT,
    VOCAB_SIZE,
    family_folder,
    model_folder,
    new_pair,
    record_decoders,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = "the rain"
# Noise outweighs the logits of a random pair, so that its drafts are accepted.
SAMPLED = {"temp": 2.0, "seed": 5}


@pytest.fixture(scope="module", autouse=True)
def _every_token_is_a_candidate():
    """A random pair agrees on 64 of 512 tokens too rarely to test what follows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (distribution, graph):
            patch.setattr(module, "MAX_CANDIDATES", VOCAB_SIZE)
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(model_folder(tmp_path_factory.mktemp("text") / "pair"))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture
def tokenizer(loaded):
    """The tokenizer of the folder; the ends that a test gives it are undone."""
    ends = set(loaded[1].eos_token_ids)
    yield loaded[1]
    loaded[1].eos_token_ids = ends


@pytest.fixture(scope="module")
def plain(model, loaded):
    """The greedy responses of plain decoding, 24 of them."""
    return responses(model, loaded[1], max_tokens=24, num_draft_tokens=0)


@pytest.fixture(scope="module")
def drafted(model, loaded):
    """Sampled responses of which many were drafted, behind a probe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_PROBE_BUDGET_S", None)
        return responses(model, loaded[1], max_tokens=40, num_draft_tokens=4, **SAMPLED)


@pytest.fixture(scope="module")
def drafter():
    return load_drafter(family_folder(SHORT) / "drafter")


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that the calls of a test make."""
    return record_decoders(monkeypatch, tokens_module)


@pytest.fixture
def script(monkeypatch, model, tokenizer):
    """Lets blocks of token ids be generated in place of the model's own."""

    def scripted(blocks, *, finish="length", **settings):
        class Scripted:
            stats = RoundStats()

            def __init__(self, *args, **kwargs):
                pass

            def close(self):
                pass

            def run(self, on_progress):
                row = TokenSequence.of(Request([1], None))
                for block in blocks:
                    reason = finish if block is blocks[-1] else None
                    logits = mx.zeros((len(block), VOCAB_SIZE))
                    yield [
                        SequenceOutput(row, 0, block, len(block) - 1, reason, logits)
                    ]

        monkeypatch.setattr(tokens_module, "Decoder", Scripted)
        return responses(model, tokenizer, max_tokens=99, **settings)

    return scripted


def responses(model, tokenizer, prompt=PROMPT, **settings):
    return list(stream_generate(model, tokenizer, prompt, **settings))


def joined(found):
    return "".join(response.text for response in found)


def ids_of(found):
    return [response.token for response in found]


class TestStream:
    def test_one_response_per_token(self, model, tokenizer, plain):
        assert len(plain) == 24
        assert joined(plain) == tokenizer.decode(ids_of(plain))
        assert [r.generation_tokens for r in plain] == list(range(1, 25))
        assert {r.prompt_tokens for r in plain} == {len(tokenizer.encode(PROMPT))}
        assert not {EOS, END_OF_TURN} & set(ids_of(plain))

    def test_finish_reason_is_the_last_ones(self, plain):
        assert [r.finish_reason for r in plain] == [None] * 23 + ["length"]

    def test_rates_are_finite(self, plain):
        for response in plain:
            assert response.prompt_tps > 0
            assert response.generation_tps > 0
            assert math.isfinite(response.prompt_tps)
            assert math.isfinite(response.generation_tps)
            assert 0 < response.peak_memory < 100

    def test_rates_are_tokens_over_seconds(self, script, monkeypatch):
        ticks = iter(range(100))  # every look at the clock takes a second
        monkeypatch.setattr(text_module, "clock", lambda: float(next(ticks)))
        first, second, third = script([[20], [21, 22]])
        # Looks: start 0, first token 1, start again 2, then one for each response.
        assert first.prompt_tps == second.prompt_tps == first.prompt_tokens / 1
        rates = [r.generation_tps for r in (first, second, third)]
        assert rates == pytest.approx([1 / 1, 2 / 2, 3 / 3])

    def test_has_the_fields_of_mlx_lm(self):
        from mlx_lm.generate import GenerationResponse as Theirs

        ours = {f.name for f in dataclasses.fields(GenerationResponse)}
        assert {f.name for f in dataclasses.fields(Theirs)} <= ours | {"logprobs"}

    @pytest.mark.parametrize(
        ("num_draft_tokens", "settings"), [(4, {}), (1, SAMPLED), (4, SAMPLED)]
    )
    def test_drafting_does_not_change_the_text(
        self, model, tokenizer, num_draft_tokens, settings
    ):
        texts = [
            generate(
                model, tokenizer, PROMPT, max_tokens=14, num_draft_tokens=k, **settings
            )
            for k in (0, num_draft_tokens)
        ]
        assert texts[0] == texts[1]

    def test_seeds(self, model, tokenizer):
        tokenizer.eos_token_ids = []  # two texts that end at once are equal
        texts = [
            generate(model, tokenizer, PROMPT, max_tokens=12, temp=2.0, seed=seed)
            for seed in (1, 2, 1, None, None)
        ]
        assert texts[0] == texts[2]
        assert len(set(texts)) == 4

    def test_xtc(self, model, tokenizer):
        settings: dict[str, Any] = {"max_tokens": 12, **SAMPLED}
        strikes: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.0}
        plain = generate(model, tokenizer, PROMPT, **settings)
        assert generate(model, tokenizer, PROMPT, **settings, **strikes) != plain
        strikes["xtc_special_tokens"] = range(VOCAB_SIZE)
        assert generate(model, tokenizer, PROMPT, **settings, **strikes) == plain

    def test_bytes_wait_for_their_character(self, script, tokenizer):
        euro = tokenizer.encode("€", add_special_tokens=False)
        assert len(euro) == 3
        found = script([euro[:1], [*euro[1:], 20]])
        assert [r.text for r in found] == ["", "", "€", tokenizer.decode([20])]

    def test_half_a_character_at_the_end(self, script, tokenizer):
        euro = tokenizer.encode("€", add_special_tokens=False)
        assert joined(script([[20], euro[:2]])) == tokenizer.decode([20]) + "\ufffd"

    def test_closed_early(self, model, tokenizer, plain, decoders):
        for _ in range(2):
            stream = stream_generate(model, tokenizer, PROMPT, max_tokens=24)
            found = list(islice(stream, 5))
            assert decoders[-1]._batch.state is not None
            stream.close()
            assert not decoders[-1]._pipeline._in_flight
            assert decoders[-1]._batch.state is None
            assert ids_of(found) == ids_of(plain)[:5]


class TestFigures:
    def test_from_draft_is_all_but_the_last_of_a_round(self, drafted):
        rounds = [list(group) for _, group in groupby(drafted, lambda r: r.rounds)]
        assert len(rounds[0]) == 1  # the prefill's
        for block in rounds[:-1]:
            assert [r.from_draft for r in block] == [True] * (len(block) - 1) + [False]
        assert sum(r.from_draft for r in drafted) >= 5

    def test_counts_add_up(self, drafted):
        last = drafted[-1]
        assert last.rounds == last.stats.rounds
        assert last.stats.drafted == 4 * last.rounds
        own_tokens = sum(not r.from_draft for r in drafted)
        num_cut = 1 + last.rounds + last.stats.accepted - len(drafted)
        assert 0 <= num_cut <= 4
        assert own_tokens == 1 + last.rounds - (num_cut > 0)

    def test_acceptance(self, drafted):
        assert (drafted[0].acceptance_length, drafted[0].acceptance_rate) == (0, 0)
        for previous, last in pairwise(drafted[1:]):
            if last.rounds > previous.rounds:  # the round before is complete
                num_tokens = previous.generation_tokens - 1
                mean = num_tokens / previous.rounds
                assert previous.acceptance_length == pytest.approx(mean)
                rate = (num_tokens / previous.rounds - 1) / 4
                assert previous.acceptance_rate == pytest.approx(rate)
        last, stats = drafted[-1], drafted[-1].stats
        assert last.acceptance_length == 1 + stats.accepted / stats.rounds
        assert last.acceptance_rate == stats.accepted / stats.drafted

    def test_plain_decoding(self, plain):
        assert not any(r.from_draft for r in plain)
        assert [r.rounds for r in plain] == list(range(24))
        assert {r.acceptance_length for r in plain[1:]} == {1}
        assert {r.acceptance_rate for r in plain} == {0}

    def test_described(self, drafted):
        last = dataclasses.replace(
            drafted[-1],
            prompt_tps=12.5,
            generation_tps=100 / 3,
            rounds=16,
            acceptance_length=2.4375,
            acceptance_rate=0.359375,
            peak_memory=0.0125,
            drafter_memory=0.0015,
            stats=RoundStats(
                rounds=16,
                drafted=64,
                accepted=23,
                rule="coupled (seed)",
                num_draft_tokens=Counter({4: 15, 0: 1}),
                drafted_at=Counter({0: 15, 1: 15}),
                accepted_at=Counter({0: 12, 1: 3}),
                exactness="not exact: because",
                max_difference=0.125,
                phases=Phases(0.5, 1.25, 0.125),
            ),
        )
        assert describe(last) == (
            "Prompt: 6 tokens, 12.500 tokens-per-sec\n"
            "Generation: 40 tokens, 33.333 tokens-per-sec\n"
            "Rounds: 16, acceptance length 2.44 tokens per round, acceptance rate "
            "35.9% of 64 drafted, rule: coupled (seed)\n"
            "Drafts: rounds 1 with K = 0, 15 with K = 4; accepted by position 0.80, "
            "0.20\n"
            "Exactness: not exact: because; largest difference that the probe saw: "
            "0.12\n"
            "Time: prefill 0.50 s, rounds 1.25 s, host 0.12 s\n"
            "Peak memory: 0.013 GB, the drafter's weights 0.002 GB"
        )

    def test_described_without_drafts(self, plain):
        last = plain[-1]
        assert "Drafts: none, num_draft_tokens is 0\n" in describe(last)
        assert "Exactness: plain decoding\n" in describe(last)

    def test_as_json(self, drafted):
        last = drafted[-1]
        found = json.loads(json.dumps(last.to_dict()))
        stats = last.stats
        assert found["generation_tokens"] == 40
        assert found["rounds_by_num_draft_tokens"] == {"4": stats.rounds}
        assert found["acceptance_by_position"] == stats.acceptance_by_position
        assert found["engaged"] is True
        assert found["why_not_engaged"] == ""
        assert found["exactness"].startswith("exact")
        assert found["prefill_s"] > 0
        assert found["rounds_s"] > 0
        assert 0 < found["drafter_memory_share"] < 1
        share = found["drafter_memory_gb"] / found["peak_memory_gb"]
        assert found["drafter_memory_share"] == pytest.approx(share)


class TestEnds:
    @pytest.mark.parametrize("num_draft_tokens", [0, 4])
    def test_an_end_token_has_no_text(self, model, tokenizer, plain, num_draft_tokens):
        tokenizer.eos_token_ids = [ids_of(plain)[6]]
        n = ids_of(plain).index(ids_of(plain)[6]) + 1
        found = responses(
            model, tokenizer, max_tokens=24, num_draft_tokens=num_draft_tokens
        )
        assert ids_of(found) == ids_of(plain)[:n]
        assert [r.finish_reason for r in found] == [None] * (n - 1) + ["stop"]
        assert found[-1].text == ""
        assert joined(found) == tokenizer.decode(ids_of(found)[:-1])

    def test_an_end_token_inside_a_block(self, model, tokenizer):
        settings = {**SAMPLED, "max_tokens": 20, "num_draft_tokens": 4}
        whole = responses(model, tokenizer, **settings)
        tokens = ids_of(whole)
        place = next(i for i, r in enumerate(whole) if r.from_draft)
        tokenizer.eos_token_ids = [tokens[place]]
        found = responses(model, tokenizer, **settings)
        assert ids_of(found) == tokens[: tokens.index(tokens[place]) + 1]
        assert found[-1].finish_reason == "stop"

    def test_end_token_as_the_last_of_the_budget(self, model, tokenizer, plain):
        tokenizer.eos_token_ids = [ids_of(plain)[0]]
        (only,) = responses(model, tokenizer, max_tokens=1)
        assert (only.finish_reason, only.text) == ("stop", "")

    @pytest.mark.parametrize(("num_draft_tokens", "kind"), [(0, list), (4, str)])
    def test_a_stop_string(self, model, tokenizer, plain, kind, num_draft_tokens):
        whole = joined(plain)
        stop = whole[9:13]
        found = responses(
            model,
            tokenizer,
            max_tokens=24,
            num_draft_tokens=num_draft_tokens,
            stop=stop if kind is str else ["never", stop],
        )
        assert joined(found) == whole[: whole.index(stop)]
        assert [r.finish_reason for r in found[:-1]] == [None] * (len(found) - 1)
        assert found[-1].finish_reason == "stop"
        assert len(found) < 24

    def test_a_stop_string_stops_the_decoder(self, model, tokenizer, plain, decoders):
        settings = {"max_tokens": 500, "num_draft_tokens": 4}
        responses(model, tokenizer, stop=joined(plain)[9:13], **settings)
        (decoder,) = decoders
        assert not decoder._pipeline._in_flight
        assert decoder._batch.state is None
        assert decoder.stats.rounds < 24

    def test_a_stop_string_over_tokens_and_blocks(self, script, tokenizer):
        a, b, c, d = (tokenizer.convert_tokens_to_ids(x) for x in "abcd")
        found = script([[d, a], [b], [c, d, d]], stop=["abc"])
        assert [r.text for r in found] == ["d", "", "", ""]
        assert ids_of(found) == [d, a, b, c]  # what the block held after it is dropped
        assert [r.finish_reason for r in found] == [None, None, None, "stop"]

    def test_a_stop_string_inside_a_token(self, script, tokenizer):
        x, eta = (tokenizer.convert_tokens_to_ids(piece) for piece in ("x", "eta"))
        found = script([[x], [eta, x]], stop="t")
        assert [r.text for r in found] == ["x", "e"]
        assert found[-1].finish_reason == "stop"

    @pytest.mark.parametrize("finish", ["length", "stop"])
    def test_what_is_held_comes_with_the_end(self, script, tokenizer, finish):
        a, b = (tokenizer.convert_tokens_to_ids(x) for x in "ab")
        last = EOS if finish == "stop" else b
        found = script([[a], [b, a], [last]], finish=finish, stop="abab!")
        assert [r.text for r in found[:-1]] == ["", "", ""]
        assert found[-1].text == ("aba" if finish == "stop" else "abab")
        assert found[-1].finish_reason == finish

    def test_a_stop_string_in_the_last_token(self, script, tokenizer):
        a, b = (tokenizer.convert_tokens_to_ids(x) for x in "ab")
        found = script([[a], [b]], finish="length", stop="ab")
        assert (joined(found), found[-1].finish_reason) == ("", "stop")

    def test_an_end_token_is_no_stop_string(self, script, tokenizer):
        found = script([[20], [EOS]], finish="stop", stop="<eos>")
        assert joined(found) == tokenizer.decode([20])


class TestLogprobs:
    @pytest.mark.parametrize("num_draft_tokens", [0, 4])
    def test_belong_to_the_token(self, model, tokenizer, num_draft_tokens):
        settings = {"max_tokens": 12, "num_draft_tokens": num_draft_tokens}
        kept = []
        for response in stream_generate(model, tokenizer, PROMPT, **settings):
            logprobs = response.logprobs  # the next round is in flight
            assert logprobs.shape == (VOCAB_SIZE,)
            assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-5)
            assert mx.argmax(logprobs).item() == response.token
            kept.append((response, np.array(logprobs)))
        assert len(kept) == 12
        for response, before in kept:
            assert np.array_equal(np.array(response.logprobs), before)

    def test_of_sampled_blocks_are_the_targets(self, model, tokenizer):
        drafted = responses(
            model, tokenizer, max_tokens=16, num_draft_tokens=4, **SAMPLED
        )
        plain = responses(
            model, tokenizer, max_tokens=16, num_draft_tokens=0, **SAMPLED
        )
        assert any(r.from_draft for r in drafted)
        for one, other in zip(drafted, plain, strict=True):
            assert mx.allclose(one.logprobs, other.logprobs, atol=1e-4)

    def test_after_the_stream_was_closed(self, model, tokenizer):
        stream = stream_generate(model, tokenizer, PROMPT, max_tokens=12)
        found = list(islice(stream, 3))
        stream.close()
        assert [mx.argmax(r.logprobs).item() for r in found] == ids_of(found)


class TestPrompts:
    def test_ids_and_text_are_the_same(self, model, tokenizer, plain):
        ids = tokenizer.encode(PROMPT)
        assert ids[0] == BOS
        for kind in (list, tuple, np.array, mx.array):
            found = responses(model, tokenizer, kind(ids), max_tokens=4)
            assert ids_of(found) == ids_of(plain)[:4]
            assert found[0].prompt_tokens == len(ids)

    def test_ids_are_taken_as_they_are(self, model, tokenizer):
        ids = tokenizer.encode(PROMPT)
        assert responses(model, tokenizer, ids[1:], max_tokens=1)[0].prompt_tokens == 5

    def test_the_first_token_is_not_doubled(self, model, tokenizer, plain):
        found = responses(model, tokenizer, f"<bos>{PROMPT}", max_tokens=4)
        assert found[0].prompt_tokens == plain[0].prompt_tokens
        assert ids_of(found) == ids_of(plain)[:4]

    def test_tokenizers_without_one(self, model):
        tokenizer = TokenizerWrapper(tiny_tokenizer(has_bos=False, has_eos=False))
        found = responses(model, tokenizer, PROMPT, max_tokens=2)
        assert found[0].prompt_tokens == 5
        with pytest.raises(RequestError, match="prompt must hold at least one token"):
            stream_generate(model, tokenizer, "")

    def test_any_tokenizer_of_transformers(self, model, plain):
        found = responses(model, tiny_tokenizer(), max_tokens=24)
        assert (ids_of(found), joined(found)) == (ids_of(plain), joined(plain))


class TestGenerate:
    def test_is_the_joined_stream(self, model, tokenizer, plain, capsys):
        assert generate(model, tokenizer, PROMPT, max_tokens=24) == joined(plain)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.usefixtures("probes")
    def test_verbose(self, model, tokenizer, plain, capsys):
        text = generate(model, tokenizer, PROMPT, max_tokens=24, verbose=True)
        out, err = capsys.readouterr()
        assert out == text + "\n" == joined(plain) + "\n"
        lines = err.splitlines()
        starts = ["Prompt: 6 tokens, ", "Generation: 24 tokens, ", "Rounds: "]
        starts += ["Drafts: ", "Exactness: exact", "Time: prefill ", "Peak "]
        for line, start in zip(lines, starts, strict=True):
            assert line.startswith(start)


class TestDrafters:
    def test_a_bare_model_decodes_plainly(self, tokenizer, plain):
        target = new_pair(has_drafter=False).target
        found = responses(target, tokenizer, max_tokens=6)
        assert ids_of(found) == ids_of(plain)[:6]
        assert found[-1].stats.drafted == 0
        with pytest.raises(RequestError, match="must be 0 without a drafter: got 4"):
            stream_generate(target, tokenizer, PROMPT, num_draft_tokens=4)

    def test_one_that_is_named_is_used(self, tokenizer, drafter, decoders):
        target = new_pair(has_drafter=False).target
        settings = {"max_tokens": 12, "draft_model": drafter, "num_draft_tokens": 4}
        found = responses(target, tokenizer, **settings, **SAMPLED)
        assert found[-1].stats.accepted > 0
        assert decoders[-1]._rounds.drafter is drafter

    def test_one_that_is_named_overrides(self, model, tokenizer, drafter, decoders):
        for draft_model in (drafter, None):
            settings = {"max_tokens": 2, "draft_model": draft_model}
            responses(model, tokenizer, **settings)
        override, own = (decoder._rounds.drafter for decoder in decoders)
        assert override is drafter
        assert own is not drafter
        assert own is not None

    def test_a_misfit(self, model, tokenizer):
        other = load_drafter(REFERENCE / "e2b" / "drafter")
        with pytest.raises(
            PairingError, match="drafter's hidden size must be"
        ) as caught:
            stream_generate(model, tokenizer, PROMPT, draft_model=other)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": [2, VOCAB_SIZE]}, "got 512, expected 0 to 511"),
        ({"prompt": [[2, 5]]}, "whole numbers: got"),
        ({"prompt": 5}, "sequence of token ids: got 5"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"max_tokens": True}, "max_tokens must be 1 or more"),
        (
            {"num_draft_tokens": 9},
            "must be from 0 to 8, or auto: got 9",
        ),
        ({"prefill_step_size": 0}, "prefill_step_size must be 1 or more: got 0"),
        ({"temp": -1.0}, "temp must be 0 or more"),
        ({"top_p": 2.0}, "top_p must be from 0 to 1"),
        ({"xtc_probability": 1.5}, "xtc_probability must be from 0 to 1: got 1.5"),
        ({"xtc_threshold": 0.6}, "xtc_threshold must be from 0 to 0.5: got 0.6"),
        ({"xtc_special_tokens": [-1]}, "xtc_special_tokens must be token ids"),
        ({"stop": ""}, "stop string must hold at least one character"),
        ({"stop": ["a", ""]}, "stop string must hold at least one character"),
    ],
)
def test_a_mistake_is_one_line_at_the_call(model, tokenizer, settings, message):
    with pytest.raises(RequestError, match=message) as caught:
        stream_generate(model, tokenizer, **{"prompt": PROMPT, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([10**6], "token ids must be below the vocabulary's size: got 1000000"),
        ([2**40], "token ids must be below the vocabulary's size"),
        ([-1], "token ids must be below the vocabulary's size: got -1"),
        (["a"], "token ids must be whole numbers: got 'a'"),
        ([1.5], "token ids must be whole numbers: got 1.5"),
        (5, "must be a sequence of token ids: got 5"),
    ],
)
def test_tokens_of_a_cache_are_checked(model, tokenizer, tokens, message):
    with pytest.raises(RequestError, match=message):
        next(stream_generate(model, tokenizer, PROMPT, cached_tokens=tokens))
