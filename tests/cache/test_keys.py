"""Every key where it belongs: rings and slabs that grow, shrink, wrap and are taken.

A target whose keys are their tokens and positions looks at what its masks show it, and
says a wrong token where that is not what a query may see.

Run: python -m pytest tests/cache/test_keys.py
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_gemma_mtp.cache import slabs as cache_module
from mlx_gemma_mtp.cache.masks import verify_masks, verify_slots
from mlx_gemma_mtp.cache.mlx_lm_cache import make_prompt_cache
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout, SlabView
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.engine import capacity as capacity_module
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.models.drafter import DraftOutput
from mlx_gemma_mtp.models.target import TargetOutput
from tests.engine.test_joining import chain_text
from tests.scripted import CHAIN_SIZE, ChainDrafter, ChainTarget

WINDOWS = (3, 40, 400)  # a ring that is short at once, one that grows, one that is not
_WRONG = CHAIN_SIZE - 1  # what no chain says


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Slabs grow often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "CAPACITY_BLOCK", 32)
        patch.setattr(capacity_module, "slots_ahead", lambda: 8)
        yield


def key_of(token: Any, position: Any) -> Any:
    return 128 * position + token


def sees(keys: mx.array, mask: mx.array, first: mx.array, last: mx.array) -> mx.array:
    """Whether queries see just the keys of positions first to last, bool [B, L].

    Args:
        keys: A slab, [B, 1, slots, 1].
        mask: [B, 1, L, slots].
        first: [B, L].
        last: [B, L].
    """
    positions = keys[:, :, :, 0] // 128  # [B, 1, slots]
    shown = mx.where(mask[:, 0], positions, 0)
    count = mask[:, 0].sum(axis=-1)
    expected = last - first + 1
    return (
        (count == expected)
        & (shown.max(axis=-1) == last)
        & (2 * shown.sum(axis=-1) == expected * (first + last))
    )


class KeyTarget(ChainTarget):
    """A chain whose keys and values are told apart.

    Args:
        window: Of its sliding layer.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        layers = (LayerKV(SLIDING, 1, 1), LayerKV(FULL, 1, 1))
        self.layout = SlabLayout(layers, window, mx.float32)

    def _fill(self, tokens, caches) -> None:
        positions = caches[0].offset + mx.arange(tokens.shape[1])
        keys = key_of(tokens, positions).astype(mx.float32)[:, None, :, None]
        for cache in caches:
            cache.update_and_fetch(keys, keys + 0.5)

    def verify(self, tokens, slabs, *, offset, first_position) -> TargetOutput:
        num_tokens, capacity = tokens.shape[1], self.layout.capacity(slabs)
        positions = offset[:, None] + mx.arange(num_tokens)
        new = key_of(tokens, positions).astype(mx.float32)[:, None, :, None]
        slots = verify_slots(
            self.layout, offset=offset, num_tokens=num_tokens, capacity=capacity
        )
        masks = verify_masks(
            self.layout,
            offset=offset,
            first_position=first_position,
            num_tokens=num_tokens,
            capacity=capacity,
        )
        oldest = mx.maximum(positions - self.layout.window + 1, first_position[:, None])
        written, is_right = [], mx.array(True)
        for i, layer in enumerate(self.layout.layers):
            kind = layer.layer_type
            view = SlabView(
                slabs[2 * i], slabs[2 * i + 1], offset=offset, slots=slots[kind]
            )
            keys, values = view.update_and_fetch(new, new + 0.5)
            first = mx.maximum(oldest, 0) if kind == SLIDING else 0 * positions
            is_right = is_right & sees(keys, masks[kind], first, positions)
            written += [keys, values]
        logits, hidden = self._predict(tokens, positions)
        wrong = 9.0 * (mx.arange(CHAIN_SIZE) == _WRONG)
        return TargetOutput(
            mx.where(is_right[..., None], logits, wrong), hidden, written
        )


class KeyDrafter(ChainDrafter):
    """A chain's drafter that looks at the target's keys.

    Args:
        window: Of the target.
    """

    layer_types: tuple[str, ...] = (SLIDING, FULL)

    def __init__(self, window: int) -> None:
        self._window = window

    def __call__(self, embedding, hidden, shared_kv, *, position) -> DraftOutput:
        draft = super().__call__(embedding, hidden, shared_kv, position=position)
        end = position[:, None]
        is_right = mx.array(True)
        for kind, kv in shared_kv.items():
            count = kv.mask[:, 0].sum(axis=-1)
            most = self._window + 1 if kind == SLIDING else 10**6
            # A cache that came in may hold one key less than a drafter would see.
            is_all = count >= mx.minimum(end, most - 1)
            is_right = is_right & is_all & (count <= most)
            is_right = is_right & sees(kv.keys, kv.mask, end - count, end - 1)
        wrong = 9.0 * (mx.arange(CHAIN_SIZE) == _WRONG)
        logits = mx.where(is_right[..., None], draft.logits, wrong)
        return DraftOutput(logits, None, draft.hidden)


def rounds_of(window: int) -> Rounds:
    return Rounds(KeyTarget(window), KeyDrafter(window), use_compile=False)


def check_cache(prompt_cache: list[Any], tokens: list[int], window: int) -> None:
    """mlx-lm's cache holds these tokens: all of them, and the window's."""
    ring, full = prompt_cache
    assert isinstance(ring, RotatingKVCache)
    assert isinstance(full, KVCache)
    assert (ring.offset, full.offset) == (len(tokens), len(tokens))
    keys = [float(key_of(token, i)) for i, token in enumerate(tokens)]
    for values, shift in ((False, 0.0), (True, 0.5)):
        rings, fulls = (c.values if values else c.keys for c in (ring, full))
        in_ring = np.array(ring._temporal_order(rings))[0, 0, :, 0]
        in_full = np.array(fulls)[0, 0, : full.offset, 0]
        assert (in_ring[-window:] - shift).tolist() == keys[-window:]
        assert (in_full - shift).tolist() == keys


def check_drafts(rows: list[Any]) -> None:
    """Drafters of even tokens are always right, given the right keys."""
    for row in rows:
        if row.request.prompt[-1] % 2 == 0:
            assert row.stats.accepted == row.stats.drafted


class Reader:
    """Steps of an open decoder; takes caches now and then, and checks them.

    Args:
        decoder: The decoder.
        window: Of its target.
    """

    def __init__(self, decoder: Decoder, window: int) -> None:
        self.decoder = decoder
        self._window = window
        self.num_taken = 0

    def step(self, rows: list[Any], wanted: int) -> None:
        """A step, and the caches of one of the rows, whatever has become of it."""
        self.decoder.step()
        if rows:
            self.take(rows[wanted % len(rows)])

    def take(self, row: Any) -> list[Any] | None:
        if not row.emitted:
            return None
        try:
            cache = self.decoder.extract(row)
        except RequestError:  # another has its seat
            assert not row.is_live
            return None
        check_cache(cache, self.decoder.tokens_of(row), self._window)
        self.num_taken += 1
        return cache


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("window", WINDOWS)
def test_rows_that_come_and_go_see_their_keys(window, data):
    """Any arrivals, lengths and limits; caches taken at any time, given back later."""
    kinds = st.tuples(
        st.integers(0, 6),  # steps before it arrives
        st.lists(st.integers(0, 95), min_size=1, max_size=60),
        st.integers(1, 60),
    )
    decoder = Decoder(
        rounds_of(window),
        num_draft_tokens=data.draw(st.sampled_from([0, 1, 3, 8])),
        look_ahead=data.draw(st.booleans()),
        prefill_step_size=data.draw(st.sampled_from([5, 2048])),
    )
    reader = Reader(decoder, window)
    rows: list[Any] = []
    for wait, prompt, limit in data.draw(st.lists(kinds, min_size=1, max_size=6)):
        wanted = data.draw(st.integers(0, 99))
        for _ in range(wait):
            reader.step(rows, wanted)
        rows.append(decoder.add(Request(prompt, limit)))
        before = rows[wanted % len(rows)]
        cache = reader.take(before)
        if cache is not None:
            held = decoder.tokens_of(before)
            follow = Request(prompt[:3], 30, history=tuple(held))
            rows.append(decoder.add(follow, cache))
    while not decoder.is_idle:
        reader.step(rows, 7 * decoder.num_live + len(rows))
    for row in rows:
        whole = [*row.request.history, *row.request.prompt]
        assert row.emitted == chain_text(whole, row.request.max_tokens)
    check_drafts(rows)


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_that_has_ended_keeps_its_keys(window, data):
    """Others go on for long; its caches can be taken at any time while they do."""
    limits = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    prompts = st.lists(st.integers(0, 95), min_size=1, max_size=50)
    requests = [Request(data.draw(prompts), limit) for limit in [*limits, 56]]
    when = data.draw(st.integers(2, 9))
    decoder = Decoder(
        rounds_of(window),
        requests,
        num_draft_tokens=data.draw(st.integers(0, 8)),
        look_ahead=data.draw(st.booleans()),
    )
    rows: dict[int, Any] = {}
    for i, emissions in enumerate(decoder.run()):
        rows |= {emission.sequence.index: emission.sequence for emission in emissions}
        if i % when == 0:
            for j, row in enumerate(rows.values()):
                less = (i // when + j) % 2
                count = max(row.num_emitted - less * (not row.is_live), 1)
                cache = decoder.extract(row, num_emitted=count)
                text = [*row.request.prompt, *row.emitted[:count]]
                check_cache(cache, text, window)
    for row in rows.values():
        assert row.emitted == chain_text(row.request.prompt, row.request.max_tokens)
    check_drafts(list(rows.values()))


@settings(max_examples=12)
@given(
    chunks=st.lists(st.sampled_from([1, 1, 2, 9, 41]), min_size=1, max_size=60),
    window=st.sampled_from(WINDOWS[:2]),
    num_drafts=st.sampled_from([0, 8]),
)
def test_mlx_lms_rings_come_back_from_every_phase(chunks, window, num_drafts):
    """Not full, rotated, rotated twice, grown by chunks; mlx-lm's code fills it."""
    rounds = rounds_of(window)
    cache: list[Any] = list(make_prompt_cache(rounds.target.layout))
    text = [(37 * i) % 96 for i in range(sum(chunks))]
    start = 0
    for size in chunks:
        chunk = mx.array([text[start : start + size]])
        rounds.target.prefill(chunk, cache, [size])
        start += size
    check_cache(cache, text, window)
    request = Request([4], 25)
    decoder = Decoder(
        rounds, [request], num_draft_tokens=num_drafts, prompt_caches=[cache]
    )
    emissions = [emission for round in decoder.run() for emission in round]
    tokens = [token for emission in emissions for token in emission.tokens]
    assert tokens == chain_text([*text, 4], 25)
    check_cache(cache, text, window)  # it was read, not written
