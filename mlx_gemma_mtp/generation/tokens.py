"""Token ids in, token ids out: the engine without text.

Knows nothing of tokenizers; see text.py for strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Unpack, cast

import mlx.core as mx

from ..cache.prompt import insert_row
from ..cache.slabs import next_capacity
from ..constants import AUTO
from ..distributed.ranks import Ranks
from ..distributed.work import begin_work, ending_where_it_fails, working
from ..engine.capacity import DEFAULT_MAX_ROWS
from ..engine.decoder import Decoder
from ..engine.prefill import DEFAULT_PREFILL_STEP_SIZE, read_prompt
from ..engine.request import Request
from ..engine.state import RoundState, row_settings
from ..errors import RequestError
from ..pair.agreed import agreed_requests, check_request
from ..pair.pair import Pair
from ..pair.planning import make_batch_plan, make_plan
from ..sampling.params import SamplingParams, plain
from .requests import check_prompt, drafts_of, eos_set, listed, make_request
from .settings import (
    GenerationSettings,
    Keywords,
    check_draft_source,
    check_num_draft_tokens,
    check_prefill_step_size,
    is_whole,
)


def generate_tokens(
    pair: Pair,
    prompt_tokens: Sequence[int] | Sequence[Sequence[int]] | mx.array,
    *,
    max_tokens: int,
    eos_token_ids: Iterable[int] | None = None,
    **settings: Unpack[Keywords],
) -> Generator[Any, None, None]:
    """Continue one prompt, or several together.

    Args:
        pair: Target and drafter, from ``load_pair``.
        prompt_tokens: Token ids of one prompt, or a list of such prompts; each has at
            least one token.
        max_tokens: Tokens to emit for each prompt, 1 or more; -1 for no limit.
        eos_token_ids: Tokens that end a sequence, the ending one is still yielded;
            None for the checkpoint's, ``()`` for none.
        settings: The other keywords, see ``generation.settings.GenerationSettings``.

    Yields:
        For one prompt token ids; for a list of prompts lists with one entry per
        prompt: its next token id, or None once it has ended.

    Raises:
        RequestError: A setting or a token id is outside its range; while tokens are
            made: a processor or sampler returned something of another shape.
    """
    chosen = GenerationSettings(max_tokens, **settings)
    entries = listed(prompt_tokens)
    is_batch = bool(entries) and isinstance(plain(entries[0]), Iterable)
    prompts: list[Any] = entries if is_batch else [entries]
    eos = pair.eos_token_ids if eos_token_ids is None else eos_set(eos_token_ids)
    requests = [
        make_request(
            pair,
            p,
            max_tokens=max_tokens,
            sampling=chosen.sampling,
            eos=eos,
            logits_processors=chosen.logits_processors,
            sampler=chosen.sampler,
            draft_source=chosen.draft_source,
        )
        for p in prompts
    ]
    opened = decoder_maker(
        pair,
        requests,
        num_draft_tokens=drafts_of(pair, chosen.num_draft_tokens, chosen.draft_source),
        draft_source=chosen.draft_source,
        exactness=chosen.exactness,
        prefill_step_size=chosen.prefill_step_size,
    )
    return _batch(pair, opened, len(prompts)) if is_batch else _single(pair, opened)


def draft_block(
    pair: Pair, prompt_tokens: Sequence[int] | mx.array, num_draft_tokens: int
) -> list[int]:
    """The greedy drafts after a prompt.

    The prompt's last token counts as the one that is not in the cache yet, so the
    drafter starts from the hidden state of the token before it.

    Args:
        pair: Target and drafter.
        prompt_tokens: At least two token ids.
        num_draft_tokens: How many tokens to draft, 1 to 8.

    Returns:
        ``num_draft_tokens`` token ids.

    Raises:
        RequestError: No drafter, or an argument outside its range.
    """
    check_num_draft_tokens(num_draft_tokens)
    if not drafts_of(pair, num_draft_tokens):
        raise RequestError(
            "num_draft_tokens must be at least 1 for a block of drafts: got "
            f"{num_draft_tokens}. 4 suits most pairs."
        )
    tokens = check_prompt(pair, prompt_tokens)
    if len(tokens) < 2:
        raise RequestError(
            "prompt must be at least 2 tokens long for a block of drafts: got "
            f"{len(tokens)}. The drafter starts from the token before the last."
        )
    with working(pair.ranks):
        return _drafted(pair, tokens, num_draft_tokens)


def _drafted(pair: Pair, tokens: list[int], num_draft_tokens: int) -> list[int]:
    """See ``draft_block``."""
    ranks, target = pair.ranks, pair.rounds.target
    waiting: AbstractContextManager[None] = nullcontext()
    if ranks is not None:
        tokens, num_draft_tokens = ranks.share([tokens, num_draft_tokens])
        size = len(tokens) - 1
        waiting = ranks.long_exchange("a block of drafts", size, target)
    with waiting:
        filled = read_prompt(target, tokens[:-1])
        slabs = target.layout.allocate(1, next_capacity(len(tokens)))
        insert_row(slabs, target.layout, 0, filled.caches)
    state = RoundState(
        slabs,
        last_token=mx.array([tokens[-1:]], dtype=mx.int32),
        hidden=filled.hidden,
        offset=mx.array([len(tokens) - 1], dtype=mx.int32),
    )
    drafts = pair.rounds.draft(
        state, row_settings([SamplingParams()]), num_draft_tokens=num_draft_tokens
    )
    found = cast(list[int], drafts[0].tolist())
    return found if ranks is None else cast(list[int], ranks.share(found))


def decoder_maker(
    pair: Pair,
    requests: Sequence[Request],
    *,
    prompt_caches: Sequence[Sequence[Any] | None] = (),
    **settings: Any,
) -> Callable[[], Decoder]:
    """What gives a decoder of checked requests, planned for this machine.

    On one machine it is made here. On several it is made when the first token is asked
    for: from then on the others wait for what one does.

    Args:
        pair: Target and drafter.
        requests: Checked ones.
        prompt_caches: See ``Decoder``.
        settings: The other keywords of ``make_decoder``.

    Raises:
        RequestError: Several machines cannot decode them.
    """
    make = partial(make_decoder, pair, requests, **settings)
    if pair.ranks is None:
        decoder = make(prompt_caches=prompt_caches)
        return lambda: decoder
    for request in requests:
        check_request(request)
    _refuse_caches(prompt_caches)
    return partial(_make_on_all, pair.ranks, make)


def _make_on_all(ranks: Ranks, make: Callable[..., Decoder]) -> Decoder:
    """A decoder on every rank, which end their work with it."""
    begin_work(ranks)
    with ending_where_it_fails(ranks):
        return make(ranks=ranks)


def make_decoder(
    pair: Pair,
    requests: Sequence[Request],
    *,
    num_draft_tokens: int | None,
    exactness: str,
    prefill_step_size: int,
    draft_source: str = AUTO,
    prompt_caches: Sequence[Sequence[Any] | None] = (),
    ranks: Ranks | None = None,
) -> Decoder:
    """A decoder of checked requests; see ``make_plan``, and ``Decoder`` for the rest.

    Raises:
        RanksError: The machines are out of step.
    """
    if ranks is not None:
        requests, agreed = agreed_requests(
            ranks,
            requests,
            [num_draft_tokens, draft_source, exactness, prefill_step_size],
        )
        num_draft_tokens, draft_source, exactness, prefill_step_size = agreed
    pair.refresh()
    plan = make_plan(
        pair,
        requests,
        num_draft_tokens=num_draft_tokens,
        exactness=exactness,
        draft_source=draft_source,
    )
    return Decoder(
        pair.rounds,
        requests,
        num_draft_tokens=plan.draft_policy,
        prefill_step_size=prefill_step_size,
        route=plan.route,
        early_start=plan.early_start,
        look_ahead=plan.look_ahead,
        prompt_caches=prompt_caches,
        why_plain=plan.why_plain,
        probe_s=plan.probe_s,
        has_text=plan.has_text,
        ranks=ranks,
    )


def _refuse_caches(prompt_caches: Sequence[Sequence[Any] | None]) -> None:
    """Refuse what one machine's caches would be.

    Raises:
        RequestError: There are some.
    """
    if any(caches is not None for caches in prompt_caches):
        raise RequestError(
            "a text on several machines must begin with its prompt: got a prompt "
            "cache. Leave it out, or use one machine."
        )


def make_batch_decoder(
    pair: Pair,
    *,
    num_draft_tokens: int | str | None = None,
    draft_source: str = AUTO,
    max_rows: int = DEFAULT_MAX_ROWS,
    max_kv_bytes: int | None = None,
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
) -> Decoder:
    """A decoder that requests join and leave; see ``Decoder.add`` and ``step``.

    Args:
        pair: Target and drafter.
        num_draft_tokens: Most drafts per round, 0 to 8; ``"auto"`` or None for as many
            as are expected to be fastest for the rows at hand.
        draft_source: Where drafts may come from; each request may ask for less.
        max_rows: Most requests that are decoded together, 1 or more.
        max_kv_bytes: Most memory of their keys and values, bytes; None for what the
            machine has beside the weights.
        prefill_step_size: Most prompt tokens in one forward, and between two rounds.

    Raises:
        RequestError: A setting is outside its range.
    """
    check_num_draft_tokens(num_draft_tokens)
    check_draft_source(draft_source)
    check_prefill_step_size(prefill_step_size)
    for name, value in (("max_rows", max_rows), ("max_kv_bytes", max_kv_bytes)):
        if value is not None and (not is_whole(value) or value < 1):
            raise RequestError(
                f"{name} must be 1 or more: got {value!r}. Leave it out."
            )
    if pair.ranks is not None:
        raise RequestError(
            "requests that join and leave must be on one machine: got "
            f"{pair.ranks.size}. Load with shard=False, or launch one."
        )
    pair.refresh()
    plan = make_batch_plan(
        pair,
        num_draft_tokens=drafts_of(pair, num_draft_tokens, draft_source),
        draft_source=draft_source,
    )
    return Decoder(
        pair.rounds,
        num_draft_tokens=plan.draft_policy,
        prefill_step_size=prefill_step_size,
        route=plan.route,
        look_ahead=plan.look_ahead,
        max_rows=max_rows,
        max_kv_bytes=max_kv_bytes or pair.default_kv_bytes,
        why_plain=plan.why_plain,
        has_text=plan.has_text,
    )


def _single(pair: Pair, opened: Callable[[], Decoder]) -> Generator[int, None, None]:
    """Token ids of the only row."""
    decoder = opened()
    with pair.wired(), closing(decoder), closing(decoder.run()) as rounds:
        for (output,) in rounds:
            output.check()
            yield from output.tokens


def _batch(
    pair: Pair, opened: Callable[[], Decoder], num_rows: int
) -> Generator[list[int | None], None, None]:
    """Rows in step: rounds emit ragged lengths, so rows ahead wait in queues."""
    queues: list[deque[int]] = [deque() for _ in range(num_rows)]
    is_live = [True] * num_rows
    decoder = opened()
    with pair.wired(), closing(decoder), closing(decoder.run()) as rounds:
        for outputs in rounds:
            for output in outputs:
                output.check()
                queues[output.sequence.index].extend(output.tokens)
                is_live[output.sequence.index] = output.finish_reason is None
            while any(queues) and all(
                queue or not live for queue, live in zip(queues, is_live, strict=True)
            ):
                yield [queue.popleft() if queue else None for queue in queues]
