"""mlx-lm's prompt caches, in and out: the same objects serve every way of decoding.

Run: python -m pytest tests/cache/test_mlx_lm_cache.py
"""

from __future__ import annotations

import tempfile
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlx_gemma_mtp.cache.mlx_lm_cache import make_prompt_cache, read_prompt_cache
from mlx_gemma_mtp.cache.prompt import insert_row, prefill_caches, take_row
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout, resize
from mlx_gemma_mtp.constants import FULL, MAX_DRAFT_TOKENS, SLIDING
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.prefill import read_on
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.scripted import ChainDrafter, ChainTarget
from tests.tiny import reference_pair, tiny_tokenizer

# Compiled rounds write the same slabs: tests/engine/test_decoder.py.
pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45, 99, 8, 120]
WINDOW = 16  # of the reference pairs


@pytest.fixture(scope="module")
def pair():
    return reference_pair("e2b")  # per-layer inputs, layers that share keys


@pytest.fixture(scope="module")
def text(pair):
    """Plain text without an end, long enough for rings to wrap."""
    return list(
        generate_tokens(
            pair, PROMPT, max_tokens=60, num_draft_tokens=0, eos_token_ids=()
        )
    )


def new_cache(pair):
    return mlx_lm_cache.make_prompt_cache(pair.target)


def go_on(pair, way, prompt, max_tokens, prompt_cache):
    """Tokens behind a prompt, one of the ways; the generator as it stands."""
    if way == "mlx-lm":
        steps = generate_step(
            mx.array(prompt),
            pair.target,
            max_tokens=max_tokens,
            prompt_cache=prompt_cache,
        )
        return (token for token, _ in steps)
    tokenizer = tiny_tokenizer(has_eos=False)
    tokenizer.eos_token_id = None
    responses = stream_generate(
        pair.target,
        tokenizer,
        prompt,
        draft_model=pair.drafter if way else None,
        max_tokens=max_tokens,
        num_draft_tokens=way,
        exactness="fast",
        prompt_cache=prompt_cache,
    )
    return Tokens(responses)


class Tokens:
    """The tokens of responses; closes them too."""

    def __init__(self, responses):
        self._responses = responses

    def __iter__(self):
        return (response.token for response in self._responses)

    def close(self):
        self._responses.close()


def lengths(prompt_cache):
    return {cache.offset for cache in prompt_cache}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mlx-lm", 0),
        ("mlx-lm", 3),
        (3, "mlx-lm"),
        (3, 8),
        *(
            pytest.param(*ways, marks=pytest.mark.slow)
            for ways in (("mlx-lm", 8), (0, "mlx-lm"), (8, "mlx-lm"))
        ),
    ],
)
def test_goes_from_one_way_to_another(pair, text, first, second):
    """The cache holds the prompt and every token; it was saved in between."""
    for count in (1, 27):
        cache = new_cache(pair)
        assert list(go_on(pair, first, PROMPT, count, cache)) == text[:count]
        assert lengths(cache) == {len(PROMPT) + count}
        cache = saved_and_loaded(cache)
        more = list(go_on(pair, second, [text[count]], 9, cache))
        assert more == text[count + 1 : count + 10]
        assert lengths(cache) == {len(PROMPT) + count + 10}


def saved_and_loaded(cache):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        mlx_lm_cache.save_prompt_cache(file.name, cache)
        loaded = mlx_lm_cache.load_prompt_cache(file.name)
        mx.eval([c.state for c in loaded])
        return loaded


@pytest.mark.parametrize(
    ("way", "counts"), [(0, (1, 2, 24)), (3, (1, 2, 3, 4, 24)), (8, (1, 5, 25))]
)
def test_holds_what_was_yielded_when_closed_early(pair, text, way, counts):
    """Wherever in a block the reader stops, the cache ends there too."""
    for count in counts:
        cache = new_cache(pair)
        responses = go_on(pair, way, PROMPT, 80, cache)
        assert list(islice(responses, count)) == text[:count]
        responses.close()
        assert lengths(cache) == {len(PROMPT) + count}
        more = list(go_on(pair, "mlx-lm", [text[count]], 5, cache))
        assert more == text[count + 1 : count + 6]


def test_has_the_windows_keys_and_no_more(pair):
    """As mlx-lm's own: rings of the window's size, keys and values the same."""
    ours, theirs = new_cache(pair), new_cache(pair)
    list(go_on(pair, 3, PROMPT, 20, ours))
    list(go_on(pair, "mlx-lm", PROMPT, 20, theirs))
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        assert one.offset == other.offset
        for name in ("keys", "values"):
            mine, his = (read_in_order(c, vars(c)[name]) for c in (one, other))
            assert mine.shape == his.shape
            assert mx.allclose(mine, his, rtol=0, atol=1e-4).item()
    rings = [cache for cache in ours if isinstance(cache, RotatingKVCache)]
    assert {vars(cache)["keys"].shape[2] for cache in rings} == {WINDOW}


def read_in_order(cache, array):
    """mlx-lm's own idea of the order of keys."""
    if isinstance(cache, RotatingKVCache):
        return cache._temporal_order(array)
    return array[:, :, : cache.offset]


def test_trimmed_caches_go_on_from_there(pair, text):
    """mlx-lm trims before the window wraps; the text goes on from the place."""
    prompt = PROMPT[:3]
    plain = list(go_on(pair, 0, prompt, 40, None))
    cache = new_cache(pair)
    assert list(go_on(pair, 3, prompt, 4, cache)) == plain[:4]
    assert mlx_lm_cache.can_trim_prompt_cache(cache)
    mlx_lm_cache.trim_prompt_cache(cache, 3)
    assert lengths(cache) == {4}
    assert list(go_on(pair, 3, plain[1:2], 30, cache)) == plain[2:32]


def test_positions_and_histories_go_on(pair):
    """A seed's noise is that of the position; processors see the prompt they get."""
    sampling: dict[str, Any] = {"temp": 1.0, "top_k": 20, "seed": 5}
    whole = list(
        generate_tokens(pair, PROMPT, max_tokens=30, num_draft_tokens=3, **sampling)
    )
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    for processors in ([], [look]):
        cache = new_cache(pair)
        list(go_on(pair, 3, PROMPT[:4], 1, cache))
        mlx_lm_cache.trim_prompt_cache(cache, 1)
        responses = stream_generate(
            pair.target,
            tiny_tokenizer(has_eos=False),
            PROMPT[4:],
            draft_model=pair.drafter,
            max_tokens=30,
            num_draft_tokens=3,
            prompt_cache=cache,
            logits_processors=processors,
            **sampling,
        )
        assert [response.token for response in responses] == whole
    assert seen[0] == PROMPT[4:]
    assert seen[-1] == [*PROMPT[4:], *whole[:-1]]


def test_an_error_leaves_the_cache_as_it_was(pair):
    cache = new_cache(pair)
    list(go_on(pair, "mlx-lm", PROMPT, 3, cache))

    def fails(tokens, logits):
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(
            stream_generate(
                pair.target,
                tiny_tokenizer(),
                [5, 6],
                max_tokens=4,
                prompt_cache=cache,
                logits_processors=[fails],
            )
        )
    assert lengths(cache) == {len(PROMPT) + 3}


def test_an_error_or_an_interrupt_keeps_what_was_yielded(pair, text):
    """A caller that stops in the middle can go on from there."""
    calls = []

    def fails(tokens, logits):
        calls.append(1)
        if len(calls) > 7:
            raise OSError("no more")
        return logits

    for processors, interrupt in (([fails], False), ([], True)):
        cache, got = new_cache(pair), []
        responses = stream_generate(
            pair.target,
            tiny_tokenizer(has_eos=False),
            PROMPT,
            draft_model=pair.drafter,
            max_tokens=40,
            num_draft_tokens=3,
            prompt_cache=cache,
            logits_processors=processors,
        )
        with pytest.raises((OSError, KeyboardInterrupt)):  # noqa: PT012
            for response in responses:
                got.append(response.token)
                if interrupt and len(got) == 5:
                    responses.throw(KeyboardInterrupt)
        assert got == text[: len(got)]
        assert lengths(cache) == {len(PROMPT) + len(got)}
        more = list(go_on(pair, "mlx-lm", [text[len(got)]], 9, cache))
        assert more == text[len(got) + 1 : len(got) + 10]


def test_progress_is_told(pair):
    told = []
    list(
        stream_generate(
            pair.target,
            tiny_tokenizer(),
            PROMPT,
            max_tokens=2,
            prefill_step_size=3,
            prompt_progress_callback=lambda *progress: told.append(progress),
        )
    )
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


class TestRows:
    """Caches of rows that join and leave."""

    def test_come_with_the_end_and_whenever_asked(self, pair, text):
        decoder = Decoder(pair.rounds, num_draft_tokens=3)
        requests = [
            Request(PROMPT, count, keeps_cache=True) for count in (1, 7, 22, 30, 30)
        ]
        rows = [decoder.add(request) for request in requests]
        ended: dict[Any, Any] = {}
        num_asked = 0
        while not decoder.is_idle:
            step = decoder.step()
            for emission in step.outputs:
                if emission.finish_reason:
                    ended[emission.sequence] = emission.prompt_cache
                    if emission.sequence.num_emitted > 1:  # it had a seat
                        count = emission.sequence.num_emitted - 1
                        late = decoder.extract(emission.sequence, num_emitted=count)
                        assert lengths(late) == {len(PROMPT) + count}
            row = rows[3]
            if row.is_live and row.num_emitted:
                num_asked += 1
                count = row.num_emitted
                assert decoder.tokens_of(row) == [*PROMPT, *text[:count]]
                cache = decoder.extract(row)
                assert lengths(cache) == {len(PROMPT) + count}
                more = list(go_on(pair, "mlx-lm", [text[count]], 3, cache))
                assert more == text[count + 1 : count + 4]
        assert num_asked > 5
        for row in rows:
            count = row.num_emitted
            cache = ended[row]
            assert row.emitted == text[:count]
            assert lengths(cache) == {len(PROMPT) + count}
            more = list(go_on(pair, 3, [text[count]], 5, cache))
            assert more == text[count + 1 : count + 6]

    def test_go_in_beside_others(self, pair, text):
        decoder = Decoder(pair.rounds, num_draft_tokens=3)
        rows = []
        for count in (0, 5, 31):
            cache = new_cache(pair)
            prompt = PROMPT
            if count:
                list(go_on(pair, "mlx-lm", PROMPT, count, cache))
                prompt = [text[count]]
            before = lengths(cache)
            rows.append((decoder.add(Request(prompt, 25), cache), count))
            assert lengths(cache) == before
        while not decoder.is_idle:
            decoder.step()
        for row, count in rows:
            start = count + bool(count)
            assert row.emitted == text[start : start + 25]
            assert row.num_cached == (len(PROMPT) + count if count else 0)

    def test_a_row_that_left_has_none(self, pair):
        decoder = Decoder(pair.rounds, num_draft_tokens=3)
        row = decoder.add(Request(PROMPT, 3))
        while not decoder.is_idle:
            decoder.step()
        with pytest.raises(RequestError, match="while it has its seat"):
            decoder.extract(row)

    def test_seeded_rows_with_a_cache(self, pair):
        sampling = SamplingParams(1.0, top_k=9, seed=4)
        whole = Decoder(
            pair.rounds, [Request(PROMPT, 20, sampling)], num_draft_tokens=2
        )
        tokens = [t for (e,) in whole.run() for t in e.tokens]
        cache = new_cache(pair)
        pair.target(mx.array([PROMPT[:5]]), cache=cache)
        decoder = Decoder(pair.rounds, num_draft_tokens=2)
        row = decoder.add(Request(PROMPT[5:], 20, sampling), cache)
        while not decoder.is_idle:
            decoder.step()
        assert row.emitted == tokens


LAYOUT = SlabLayout(
    (LayerKV(SLIDING, 1, 1), LayerKV(FULL, 1, 1)), window=6, dtype=mx.float32
)


@settings(max_examples=60)
@given(
    length=st.integers(1, 40),
    blocks=st.lists(st.integers(0, MAX_DRAFT_TOKENS), max_size=6),
    back=st.integers(0, 5),
)
def test_a_row_comes_out_as_it_went_in(length, blocks, back):
    """Keys are their positions; what lies beyond or was overwritten stays inside."""
    caches = prefill_caches(LAYOUT)
    keys = mx.arange(length, dtype=mx.float32)[None, None, :, None]
    for cache in caches:
        cache.update_and_fetch(keys, keys)
    slabs = LAYOUT.allocate(2, 256)
    insert_row(slabs, LAYOUT, 1, caches)
    position = length
    for accepted in blocks:
        write(slabs, position)
        position += accepted + 1
    write(slabs, position)  # a round that was queued too early
    resize(slabs, LAYOUT, 512, rows=[1, 0, 1])
    last = blocks[-1] + 1 if blocks else 0
    num_tokens = position - min(back, last)
    (ring, full) = take_row(slabs, LAYOUT, 0, num_tokens=num_tokens, first_position=0)
    assert (ring.offset, full.offset) == (num_tokens, num_tokens)
    assert numbers_in(full) == list(range(num_tokens))
    first = max(0, num_tokens - (LAYOUT.window + 1))
    assert (
        numbers_in(ring)[-LAYOUT.window :]
        == list(range(first, num_tokens))[-LAYOUT.window :]
    )


def write(slabs, position):
    """A block of the longest size; its keys are their positions."""
    for i, slab in enumerate(slabs):
        for p in range(position, position + MAX_DRAFT_TOKENS + 1):
            slab[1, 0, p % slab.shape[2]] = float(p)
        slabs[i] = slab


def numbers_in(cache):
    keys, values = cache.keys_and_values()
    assert np.array_equal(np.array(keys), np.array(values))
    return np.array(keys)[0, 0, :, 0].tolist()


class WideTarget(ChainTarget):
    """A chain with many keys and values, of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = SlabLayout((LayerKV(FULL, 4, 64),) * 8, 4, mx.float32)

    def _fill(self, tokens, caches) -> None:
        for cache in caches:
            zeros = mx.zeros((tokens.shape[0], 4, tokens.shape[1], 64))
            cache.update_and_fetch(zeros, zeros)


@pytest.mark.parametrize("max_tokens", [1, 12])
@pytest.mark.parametrize("others", [0, 1])
def test_keys_are_held_once_beside_the_callers(max_tokens, others):
    """In slabs, while the caller's cache holds the same: and of one layer again."""
    target = WideTarget()
    rounds = Rounds(target, ChainDrafter(), use_compile=False)
    cache = make_prompt_cache(target.layout)
    read_on(target, cache, [5] * 4000)
    layer = cache[0].nbytes
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    requests = [Request([4, 6, 8], max_tokens), *[Request([4], 40)] * others]
    decoder = Decoder(
        rounds,
        requests,
        num_draft_tokens=3,
        prompt_caches=[cache, *[None] * others],
    )
    run, ended = decoder.run(), None
    while ended is None:
        emissions = next(run)
        slabs = decoder.kv_bytes
        ended = next((e.sequence for e in emissions if e.finish_reason), None)
    decoder.extract(ended, into=cache)
    run.close()
    assert mx.get_peak_memory() - before <= slabs + 1.8 * layer
    assert {c.offset for c in cache} == {4000 + 3 + max_tokens}


class TestMistakes:
    """A cache that is not the target's is one clear line."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda caches: caches[:-1], "one entry for each layer"),
            (lambda caches: [KVCache() for _ in caches], "must have a RotatingKVCache"),
            (
                lambda caches: [
                    QuantizedKVCache() if isinstance(c, KVCache) else c for c in caches
                ],
                "must have a KVCache: got QuantizedKVCache",
            ),
            (
                lambda caches: [
                    RotatingKVCache(4) if isinstance(c, RotatingKVCache) else c
                    for c in caches
                ],
                "got max_size=4",
            ),
            (lambda caches: [filled(c) for c in caches], "got keys of shape"),
            (lambda caches: [offset(i, c) for i, c in enumerate(caches)], "as many"),
        ],
    )
    def test_are_named(self, pair, change, message):
        cache = change(new_cache(pair))
        with pytest.raises(RequestError, match=message):
            stream_generate(
                pair.target, tiny_tokenizer(), PROMPT, max_tokens=2, prompt_cache=cache
            )

    def test_empty_is_as_none(self, pair):
        layout = pair_of(pair.target).rounds.target.layout
        assert read_prompt_cache(layout, new_cache(pair)) is None
        empty = make_prompt_cache(layout)
        assert lengths(empty) == {0}
        assert all(cache.keys is None for cache in empty)


def filled(cache):
    cache.update_and_fetch(mx.zeros((2, 1, 3, 5)), mx.zeros((2, 1, 3, 5)))
    return cache


def offset(i, cache):
    cache.offset = i
    return cache
