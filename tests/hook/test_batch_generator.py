"""mlx-lm's interface to batches, over rows that draft.

Run: python -m pytest tests/hook/test_batch_generator.py
"""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator as Theirs
from mlx_lm.generate import StopSequences, batch_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.hook.batch_generator import BatchGenerator
from mlx_gemma_mtp.pair import pair as pair_module
from mlx_gemma_mtp.pair.load import load_pair
from tests.tiny import reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPTS = [[2, 17, 300, 45], [2, 9], [2, *range(40, 75)], [2, 120, 121, 122, 123, 124]]


@pytest.fixture(scope="module")
def pair():
    pair = reference_pair()
    pair_module.attach(pair.target, pair)
    return pair


@pytest.fixture
def generator(pair):
    generator = BatchGenerator(pair.target, num_draft_tokens=3)
    yield generator
    generator.close()


def collect(generator):
    """Everything it gives up to the end: tokens, last responses, prompt responses."""
    tokens: dict[int, list[int]] = {}
    ends: dict[int, Any] = {}
    prompts: list[Any] = []
    while True:
        read, generated = generator.next()
        if not read and not generated:
            return tokens, ends, prompts
        prompts += read
        for r in generated:
            tokens.setdefault(r.uid, []).append(r.token)
            assert r.uid not in ends
            if r.finish_reason is not None:
                ends[r.uid] = r
            else:
                assert r.prompt_cache is None
                assert r.all_tokens is None


def test_gives_the_tokens_of_mlx_lms_own(pair):
    """Same calls, same tokens, same reasons, caches of the same length."""
    stop = [[text[6]] for text in [alone(pair, PROMPTS[1], 12)]]
    found = []
    for make in (BatchGenerator, Theirs):
        generator = make(pair.target, stop_tokens=stop, max_tokens=9)
        generator.insert(PROMPTS[:2])
        generator.insert(PROMPTS[2:], [1, 30])
        tokens, ends, _ = collect(generator)
        generator.close()
        found.append(
            (
                tokens,
                {uid: (r.finish_reason, r.all_tokens) for uid, r in ends.items()},
                {uid: r.prompt_cache[0].offset for uid, r in ends.items()},
            )
        )
    assert found[0] == found[1]
    reasons = {uid: reason for uid, (reason, _) in found[0][1].items()}
    assert reasons[1] == "stop"
    assert reasons[2] == "length"


def empty(uids):
    return {uid: list[int]() for uid in uids}


def alone(pair, prompt, count, **settings):
    return list(
        generate_tokens(
            pair,
            prompt,
            max_tokens=count,
            num_draft_tokens=0,
            eos_token_ids=(),
            **settings,
        )
    )


def test_several_tokens_of_a_row_come_at_once_and_in_order():
    pair = load_pair()
    pair_module.attach(pair.target, pair)
    generator = BatchGenerator(pair.target, num_draft_tokens=3)
    (uid,) = generator.insert([PROMPTS[0]], [24])
    most, tokens = 0, []
    while responses := generator.next_generated():
        assert {r.uid for r in responses} == {uid}
        most = max(most, len(responses))
        tokens += [r.token for r in responses]
        for r in responses:
            assert r.logprobs.shape == (pair.vocab_size,)
            assert mx.argmax(r.logprobs).item() == r.token
            assert mx.exp(r.logprobs).sum().item() == pytest.approx(1, abs=0.1)
    generator.close()
    assert tokens == alone(pair, PROMPTS[0], 24)
    assert most > 1


def test_samplers_processors_and_seeds_stay_in_the_batch(pair, generator):
    """Each row has its own; one with a seed is decoded beside the others."""
    bias = {7: 100.0}
    uids = generator.insert(
        PROMPTS,
        [10] * 4,
        samplers=[None, make_sampler(0.9, top_k=12), None, make_sampler(1.0)],
        logits_processors=[[], [], make_logits_processors(bias), []],
        seeds=[None, 11, None, 12],
    )
    most, tokens = 0, empty(uids)
    while responses := generator.next_generated():
        most = max(most, len({r.uid for r in responses}))
        for r in responses:
            tokens[r.uid].append(r.token)
    assert most == 4
    assert tokens[uids[0]] == alone(pair, PROMPTS[0], 10)
    expected = alone(pair, PROMPTS[1], 10, temp=0.9, top_k=12, seed=11)
    assert tokens[uids[1]] == expected
    assert tokens[uids[2]] == [7] * 10
    assert tokens[uids[3]] == alone(pair, PROMPTS[3], 10, temp=1.0, seed=12)


def test_seeds_may_be_drawn(pair):
    seeds = iter([5, 6, 5, 6])
    texts = []
    for num_draft_tokens in (3, 1):
        generator = BatchGenerator(
            pair.target,
            sampler=make_sampler(1.0),
            num_draft_tokens=num_draft_tokens,
            draw_seed=lambda sampler: next(seeds),
        )
        generator.insert(PROMPTS[:2], [9, 9])
        texts.append(collect(generator)[0])
        generator.close()
    assert texts[0] == texts[1]


def test_segments_end_where_caches_can_be_had(pair, generator):
    """At each end, and before the last token, as mlx-lm's own server wants them."""
    segments = [PROMPTS[2][:10], PROMPTS[2][10:30], PROMPTS[2][30:]]
    (uid,) = generator.insert_segments([segments], [12])
    text = alone(pair, PROMPTS[2], 12)
    lengths = []
    while True:
        read, generated = generator.next()
        for r in read:
            if not r.end_of_segment:
                continue
            lengths.append((r.progress[0], r.end_of_prompt))
            if r.end_of_prompt:
                continue
            ((cache, tokens),) = generator.extract_cache([uid]).values()
            assert tokens == PROMPTS[2][: r.progress[0]]
            assert cache[0].offset == len(tokens)
            rest = BatchGenerator(pair.target, num_draft_tokens=2)
            rest.insert([PROMPTS[2][len(tokens) :]], [12], [cache], [tokens])
            more, ends, _ = collect(rest)
            rest.close()
            assert more == {0: text}
            assert ends[0].all_tokens == [*PROMPTS[2], *text]
        if not read and not generated:
            break
    count = len(PROMPTS[2])
    assert lengths == [(10, False), (30, False), (count - 1, False), (count, True)]


def test_requests_can_be_removed_wherever_they_are(pair):
    generator = BatchGenerator(
        pair.target, num_draft_tokens=3, completion_batch_size=2, prefill_batch_size=1
    )
    uids = generator.insert(PROMPTS, [30] * 4)
    tokens = empty(uids)

    def run(count):
        for _ in range(count):
            for r in generator.next()[1]:
                tokens[r.uid].append(r.token)

    run(3)
    caches = generator.remove([uids[0], uids[3], 77], return_prompt_caches=True)
    assert set(caches) == {uids[0], uids[3]}
    cache, held = caches[uids[0]]
    assert held == [*PROMPTS[0], *tokens[uids[0]]]
    assert cache[0].offset == len(held)
    assert generator.remove([uids[0]]) == {}
    run(40)
    assert len(tokens[uids[0]]) < 30
    assert tokens[uids[1]] == alone(pair, PROMPTS[1], 30)
    assert tokens[uids[2]] == alone(pair, PROMPTS[2], 30)
    assert tokens[uids[3]] == []
    generator.close()


def test_counts_its_work(generator):
    with generator.stats() as stats:
        generator.insert(PROMPTS, [10] * 4)
        tokens, _, _ = collect(generator)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.generation_tokens == sum(map(len, tokens.values())) == 40
    assert 0 < stats.generation_steps < 40
    assert stats.prompt_time > 0
    assert stats.decode_time > 0
    assert stats.wall_time >= stats.prompt_time + stats.decode_time
    assert stats.peak_memory > 0


def test_memory_is_told_and_given_back(pair):
    generator = BatchGenerator(pair.target, num_draft_tokens=3, prefill_step_size=10)
    assert generator.prompt_cache_nbytes == 0
    (uid,) = generator.insert([[5] * 30], [9])
    generator.next()
    assert generator.prompt_cache_nbytes > 0  # of what was read of the prompt
    generator.remove([uid])
    assert generator.prompt_cache_nbytes == 0
    generator.insert(PROMPTS, [9] * 4)
    for _ in range(3):  # a pause before each last token
        generator.next()
    assert generator.prompt_cache_nbytes > 0
    collect(generator)
    assert generator.prompt_cache_nbytes == 0
    generator.close()


def test_serves_mlx_lms_own_batch_generate(pair, monkeypatch):
    """The function builds its generator itself; with ours in place it works on."""
    import sys

    module = sys.modules[batch_generate.__module__]
    monkeypatch.setattr(module, "BatchGenerator", BatchGenerator)

    class Tokenizer:
        eos_token_ids = frozenset[int]()

        def decode(self, tokens):
            return " ".join(map(str, tokens))

    caches: list[Any] = []
    for text in (None, *[alone(pair, p, 8) for p in PROMPTS]):
        if text is not None:
            cache = make_prompt_cache(pair.target)
            pair.target(mx.array([PROMPTS[len(caches)]]), cache=cache)
            caches.append(cache)
    found = batch_generate(
        pair.target,
        Tokenizer(),
        [[text[0]] for text in [alone(pair, p, 1) for p in PROMPTS]],
        caches,
        max_tokens=[3, 1, 7, 7],
        return_prompt_caches=True,
        return_token_ids=True,
        return_logprobs=True,
    )
    texts = [alone(pair, p, 8)[1:] for p in PROMPTS]
    assert found.token_ids == [
        text[:n] for text, n in zip(texts, (3, 1, 7, 7), strict=True)
    ]
    assert [len(values) for values in found.logprobs or ()] == [3, 1, 7, 7]
    assert [cache[0].offset for cache in found.caches or ()] == [
        len(p) + 1 + n for p, n in zip(PROMPTS, (3, 1, 7, 7), strict=True)
    ]
    assert [c[0].offset for c in caches] == [len(p) for p in PROMPTS]


class TestMistakes:
    """One clear line, and nothing is inserted."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1, 2], []],), "Sequence 1 has an empty prompt"),
            (([[1, 2]], [0]), "max_tokens must be > 0"),
            (([[1, 2]], [1, 2]), "Option max_tokens must have one entry"),
            (([[1], [2]], None, [None]), "Option caches must have one entry"),
            (([[1], [99999]],), "below the vocabulary's size: got 99999"),
            (([[1]], [5], [[1, 2, 3]]), "one entry for each layer"),
        ],
    )
    def test_are_named(self, generator, arguments, message):
        with pytest.raises(ValueError, match=message):
            generator.insert(*arguments)
        assert generator.next() == ([], [])
        assert generator.insert([[1, 2]]) == [0]

    def test_memory_that_is_never_enough(self, pair):
        generator = BatchGenerator(pair.target, max_kv_bytes=100_000)
        with pytest.raises(RequestError, match=r"must fit into 0\.1 MB"):
            generator.insert([[1] * 5000], [5])
        # Many ask for a huge number of tokens where they want no limit.
        generator.insert([[1, 2]], [10**9])
        tokens, ends, _ = collect(generator)
        assert ends[0].finish_reason == "length"
        assert 100 < len(tokens[0]) < 5000
        generator.close()

    def test_a_processor_of_another_shape_is_raised(self, generator):
        generator.insert([[1, 2]], [5], logits_processors=[[lambda _, x: x[0]]])
        with pytest.raises(RequestError, match="a logits processor must return"):
            collect(generator)
        assert generator.next() == ([], [])

    def test_a_processor_that_raises_takes_nothing_from_others(self, pair, generator):
        """Their tokens of the same step come first, and they go on."""
        calls = []

        def fails(tokens, logits):
            calls.append(1)
            if len(calls) == 6:
                raise OSError("no more")
            return logits

        generator.insert(PROMPTS[:2], [20] * 2, logits_processors=[[fails], []])
        tokens: dict[int, list[int]] = {0: [], 1: []}
        num_raised = 0
        while True:
            try:
                responses = generator.next_generated()
            except OSError:
                num_raised += 1
                continue
            if not responses:
                break
            for r in responses:
                tokens[r.uid].append(r.token)
        assert num_raised == 1
        assert tokens[1] == alone(pair, PROMPTS[1], 20)
        assert tokens[0] == alone(pair, PROMPTS[0], 20)[: len(tokens[0])]
        assert 3 < len(tokens[0]) < 7

    def test_a_generator_that_was_not_made_can_be_thrown_away(self, pair):
        with pytest.raises(RequestError, match="num_draft_tokens"):
            BatchGenerator(pair.target, num_draft_tokens=99)
        gc.collect()


def test_stop_sequences_of_a_request(pair, generator):
    text = alone(pair, PROMPTS[0], 20)
    first = next(i for i in range(19) if text[i : i + 2] == text[4:6])
    generator.insert(
        [PROMPTS[0]] * 2,
        [20, 20],
        stop_sequences=[StopSequences([text[4:6]]), StopSequences()],
    )
    tokens, ends, _ = collect(generator)
    assert tokens[0] == text[: first + 2]
    assert tokens[1] == text
    assert [ends[i].finish_reason for i in (0, 1)] == ["stop", "length"]
