"""The choices of a round by kernels: what ``decision`` does, in a few launches.

A decision takes three: with top-k, the row's best tokens in two steps and the rule over
those lists; without, the threshold of every row, the rule, and the draw over the one
row that needs it. A draft step takes two or three. Nothing is read by the host, and
the results are those of the plain operations, up to the last bits of floats.

This file knows the rows' settings and the kernels' arguments, and nothing of models.
"""

from __future__ import annotations

import mlx.core as mx

from ..kernels import common, decide, judge, propose, resample, select, threshold
from ..kernels.trial import works
from .acceptance import Accepted, Draft, accept_equal
from .distribution import Distribution
from .graph import Group, SamplingArrays


def proposes(group: Group) -> bool:
    """Whether the kernels run here and draw drafts as the rows ask; not with XTC."""
    return not group.has_xtc and works(select.KERNEL, propose.KERNEL)


def decides(group: Group) -> bool:
    """Whether the kernels run here and decide these rows.

    They do not for XTC, and for a top-k that leaves more than a list.
    """
    if group.list_size == common.LIST:
        return works(select.KERNEL, decide.KERNEL)
    if group.list_size or group.has_xtc or group.has_top_k:
        return False
    return works(threshold.KERNEL, judge.KERNEL, resample.KERNEL)


def propose_one(
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    group: Group,
    offset: mx.array,
    step: int,
    token_ids: mx.array | None,
) -> Draft:
    """Choose the draft of one step.

    Args:
        logits: As of ``decision.propose``, and so are the others and the result.
        sampling: See there.
        group: What drafts are drawn by.
        offset: See there.
        step: See there.
        token_ids: See there.
    """
    floats, words = row_numbers(sampling, offset)
    listed = None if token_ids is None else token_ids[:, 0]
    values, ids, stats = select.most_likely(logits[:, 0], token_ids=listed)
    tokens, scores = propose.propose(
        values, ids, stats, row_floats=floats, row_words=words, step=step
    )
    if not group.has_block:
        return Draft(tokens, None)
    count = min(common.LIST, logits.shape[-1])
    source = Distribution(scores[..., :count], ids[:, None, :count], is_whole=False)
    return Draft(tokens, source)


def decide_all(
    draft: Draft,
    logits: mx.array,
    sampling: SamplingArrays,
    *,
    group: Group,
    offset: mx.array,
) -> Accepted:
    """Decide the rows of a group; arguments and result as of ``decision.decide``."""
    numbers = row_numbers(sampling, offset)
    draft = _in_lists(draft)
    if group.list_size:
        return _by_list(draft, logits, numbers)
    return _by_threshold(draft, logits, numbers, group)


def _in_lists(draft: Draft) -> Draft:
    """The same block in lists of 64, as kernels take them; few tokens make fewer."""
    source = draft.source
    if source is None or source.scores.shape[-1] == common.LIST:
        return draft
    room = [(0, 0), (0, 0), (0, common.LIST - source.scores.shape[-1])]
    scores = mx.pad(source.scores, room, constant_values=-mx.inf)
    ids = mx.pad(source.token_ids, room, constant_values=common.NO_ID)
    return Draft(draft.tokens, Distribution(scores, ids, is_whole=False))


def _by_list(
    draft: Draft, logits: mx.array, numbers: tuple[mx.array, mx.array]
) -> Accepted:
    """Decide rows whose top-k leaves a short list."""
    num_rows, num_tokens, vocab_size = logits.shape
    values, ids, stats = select.most_likely(logits.reshape(-1, vocab_size))
    source = draft.source
    report = decide.decide(
        values.reshape(num_rows, num_tokens, -1),
        ids.reshape(num_rows, num_tokens, -1),
        stats.reshape(num_rows, num_tokens, -1),
        draft.tokens,
        None if source is None else source.scores,
        None if source is None else source.token_ids,
        row_floats=numbers[0],
        row_words=numbers[1],
    )
    return _accepted(report)


def _by_threshold(
    draft: Draft,
    logits: mx.array,
    numbers: tuple[mx.array, mx.array],
    group: Group,
) -> Accepted:
    """Decide rows that may draw any token."""
    floats, words = numbers
    source = draft.source
    stats, tokens = threshold.threshold(
        logits,
        row_floats=floats,
        row_words=words,
        has_top_p=group.has_top_p,
        has_min_p=group.has_min_p,
        has_coupled=group.has_coupled or source is None,
    )
    if source is None:
        return accept_equal(draft.tokens, tokens)
    report, reach = judge.judge(
        logits,
        stats,
        tokens,
        draft.tokens,
        source.scores,
        source.token_ids,
        row_floats=floats,
        row_words=words,
    )
    report = resample.resample(
        report,
        reach,
        logits,
        stats,
        source.scores,
        source.token_ids,
        row_floats=floats,
        row_words=words,
    )
    return _accepted(report)


def _accepted(report: mx.array) -> Accepted:
    """What a report says; all behind the accepted drafts is the round's last token."""
    return Accepted(report[:, 0], report[:, -1:])


def row_numbers(
    sampling: SamplingArrays, offset: mx.array
) -> tuple[mx.array, mx.array]:
    """The rows' settings as the kernels take them, float32 and uint32 [B, 8]."""
    num_rows = offset.shape[0]
    temp = sampling.temp[:, 0]
    columns = [temp, sampling.top_p[:, 0], sampling.min_p[:, 0]]
    room = mx.zeros((num_rows, common.ROW_FLOATS - len(columns)))
    floats = mx.concatenate([*columns, room], axis=1)
    sampled = mx.where(sampling.is_block[:, None], common.BLOCK, common.COUPLED)
    mode = mx.where(temp > 0, sampled, common.GREEDY)
    whole = [sampling.seed, mode, sampling.top_k[:, 0], offset[:, None]]
    words = [column.astype(mx.uint32) for column in whole]
    room = mx.zeros((num_rows, common.ROW_WORDS - 5), dtype=mx.uint32)
    return floats, mx.concatenate([*words, room], axis=1)
