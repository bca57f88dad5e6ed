"""The 64 most likely tokens of every row, and the mass of the whole row.

One read of the logits, no sort, no atomics. A threadgroup of 256 threads takes a block
of 8192 logits, 32 to a thread, and keeps them in registers:

1. Each thread finds its best. The 64th best of these 256 is a bound: 64 threads have
   something that reaches it, so the 64 best of the block all do.
2. What reaches the bound is gathered. It stands in 64 threads alone (every other
   thread's best is below), so there are at most 2048 such logits however the block
   looks; of logits in random order about 73.
3. The place of each in the list is the number of those that beat it.

Keys are (logit, id) pairs, higher logits and then lower ids first, so equal logits are
no special case: a block of nothing but equal ones keeps the bounds above. A radix
search for the bound would need several passes, histograms with atomics, and room for
all ties.

A second launch of the same body takes the lists of all blocks of a row as one block,
so a row has at most 128 blocks.
"""

from __future__ import annotations

import mlx.core as mx

from . import common

MAX_COLUMNS = 128 * 8192  # the lists of 128 blocks are a block themselves

BLOCK = 8192
_THREADS = common.MAX_THREADS
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)

_SOURCE = r"""
  // HAS_IDS: ids are given. MERGE: the logits are lists of
  // blocks, and numbers has their stats; otherwise numbers[0] is the soft-cap.
  // M: columns. PER_THREAD: columns of a thread.
  const uint THREADS = 256u;
  const uint LIST = 64u;
  const uint PAD_ORDER = 0x007FFFFFu;  // of -inf
  const uint PAD_ID = 0x7FFFFFFFu;
  const uint WIDTH = M < 8 ? 8u : uint(M);
  const uint NUM_PARTS = uint(M) / LIST;

  threadgroup uint best_orders[256];
  threadgroup uint best_ids[256];
  threadgroup uint orders[2048];
  threadgroup uint ids[2048];
  threadgroup uint counts[8];
  threadgroup float sums[8];
  threadgroup uint marks[3];  // the block's best logit, the bound's logit and id

  uint thread_id = thread_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  uint group = simdgroup_index_in_threadgroup;
  uint block = threadgroup_position_in_grid.x;
  uint row = threadgroup_position_in_grid.y;
  uint num_blocks = MERGE ? 1u : (uint(M) + 8191u) / 8192u;
  uint first = block * 8192u + thread_id;
  float cap = MERGE ? 0.0f : numbers[0];

  // This thread's logits, and the best of them.
  uint mine[PER_THREAD];
  uint best_order = 0u;
  uint best_id = 0xFFFFFFFFu;
  #pragma unroll
  for (int e = 0; e < PER_THREAD; e++) {
    uint column = first + uint(e) * THREADS;
    uint order = PAD_ORDER;
    uint id = PAD_ID;
    if (column < uint(M)) {
      order = order_of(capped(float(logits[row * WIDTH + column]), cap));
      id = HAS_IDS ? uint(token_ids[row * WIDTH + column]) : column;
    }
    mine[e] = order;
    bool is_better = order > best_order || (order == best_order && id < best_id);
    best_order = is_better ? order : best_order;
    best_id = is_better ? id : best_id;
  }
  best_orders[thread_id] = best_order;
  best_ids[thread_id] = best_id;
  BARRIER();

  // Its place among the threads' best. Of equal pairs the lower thread is first, so
  // that every place is taken once.
  uint place = 0u;
  for (uint i = 0u; i < THREADS; i++) {
    uint order = best_orders[i];
    uint id = best_ids[i];
    bool is_equal = order == best_order && id == best_id;
    bool is_before = order > best_order || (order == best_order && id < best_id);
    place += (is_before || (is_equal && i < thread_id)) ? 1u : 0u;
  }
  if (place == 0u) {
    marks[0] = best_order;
  }
  if (place == LIST - 1u) {
    marks[1] = best_order;
    marks[2] = best_id;
  }
  BARRIER();

  // How many of this thread's logits reach the bound, and the sum of exponentials.
  bool is_chosen = place < LIST;
  uint bound_order = marks[1];
  uint bound_id = marks[2];
  float largest = value_of(marks[0]);
  float shift = marks[0] > PAD_ORDER ? largest : 0.0f;
  uint reaching = 0u;  // a bit for each
  uint count = 0u;
  float sum = 0.0f;
  #pragma unroll
  for (int e = 0; e < PER_THREAD; e++) {
    uint column = first + uint(e) * THREADS;
    uint order = mine[e];
    bool reaches = is_chosen && order > bound_order;
    if (is_chosen && order == bound_order) {
      uint id = PAD_ID;
      if (column < uint(M)) {
        id = HAS_IDS ? uint(token_ids[row * WIDTH + column]) : column;
      }
      reaches = id <= bound_id;
    }
    reaching |= reaches ? (1u << e) : 0u;
    count += reaches ? 1u : 0u;
    if (!MERGE) {
      sum += exp(value_of(order) - shift);
    }
  }
  if (MERGE && thread_id < NUM_PARTS) {
    uint part = (row * NUM_PARTS + thread_id) * 2u;
    sum = numbers[part + 1u] * exp(numbers[part] - shift);
  }
  uint position = simd_prefix_exclusive_sum(count);
  uint group_count = simd_sum(count);
  float group_sum = simd_sum(sum);
  if (lane == 0u) {
    counts[group] = group_count;
    sums[group] = group_sum;
  }
  BARRIER();

  // Gather them.
  uint total = 0u;
  for (uint i = 0u; i < 8u; i++) {
    position += i < group ? counts[i] : 0u;
    total += counts[i];
  }
  #pragma unroll
  for (int e = 0; e < PER_THREAD; e++) {
    if ((reaching >> e) & 1u) {
      uint column = first + uint(e) * THREADS;
      uint id = PAD_ID;
      if (column < uint(M)) {
        id = HAS_IDS ? uint(token_ids[row * WIDTH + column]) : column;
      }
      orders[position] = mine[e];
      ids[position] = id;
      position += 1u;
    }
  }
  BARRIER();

  // The place of each is the number of those before it.
  uint list = row * num_blocks + block;
  for (uint c = thread_id; c < total; c += THREADS) {
    uint my_order = orders[c];
    uint my_id = ids[c];
    uint before = 0u;
    for (uint i = 0u; i < total; i++) {
      uint order = orders[i];
      uint id = ids[i];
      bool is_equal = order == my_order && id == my_id;
      bool is_before = order > my_order || (order == my_order && id < my_id);
      before += (is_before || (is_equal && i < c)) ? 1u : 0u;
    }
    if (before < LIST) {
      best_values[list * LIST + before] = value_of(my_order);
      best_tokens[list * LIST + before] = int(my_id);
    }
  }
  if (thread_id == 0u) {
    float mass = 0.0f;
    for (uint i = 0u; i < 8u; i++) {
      mass += sums[i];
    }
    stats[list * 2u] = largest;
    stats[list * 2u + 1u] = mass;
  }
"""

KERNEL = common.Kernel(
    name="select",
    input_names=("logits", "token_ids", "numbers"),
    output_names=("best_values", "best_tokens", "stats"),
    source=_SOURCE,
)


def most_likely(
    logits: mx.array, *, token_ids: mx.array | None = None, softcap: float = 0.0
) -> tuple[mx.array, mx.array, mx.array]:
    """The best tokens of every row in order; of equal ones the lowest ids first.

    Args:
        logits: Scores of M candidates, [R, M], float32, float16 or bfloat16; M at most
            ``MAX_COLUMNS``.
        token_ids: The candidates' ids, int32 [R, M], no two of a row equal; None where
            M is the vocabulary.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; 0 for no cap.

    Returns:
        ``values`` float32 [R, 64], descending, and ``ids`` int32 [R, 64], padded with
        -inf and 0x7fffffff where M is below 64; ``stats`` float32 [R, 2]: the row's
        largest logit and the sum of ``exp(logit - largest)`` over the whole row. All
        after the cap.

    Raises:
        ValueError: The logits have a shape or a type that the kernel cannot take.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_COLUMNS:
        raise ValueError(
            f"logits must be [R, M], M from 1 to {MAX_COLUMNS}: got {logits.shape}"
        )
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be floats of 32 or 16 bits: got {logits.dtype}")
    R, M = logits.shape
    ids = token_ids
    if M < 8:  # columns that the kernel does not look at
        logits = mx.pad(logits, [(0, 0), (0, 8 - M)])
        ids = None if ids is None else mx.pad(ids, [(0, 0), (0, 8 - M)])
    num_blocks = -(-M // BLOCK)
    values, tokens, stats = _launch(
        logits,
        mx.zeros((common.MIN_ELEMENTS,), dtype=mx.int32)
        if ids is None
        else ids.astype(mx.int32),
        mx.full((common.MIN_ELEMENTS,), softcap, dtype=mx.float32),
        num_blocks=num_blocks,
        template=[("HAS_IDS", ids is not None), ("MERGE", False), ("M", M)],
    )
    if num_blocks > 1:
        num_columns = num_blocks * common.LIST
        values, tokens, stats = _launch(
            values.reshape(R, num_columns),
            tokens.reshape(R, num_columns),
            common.padded(stats),
            num_blocks=1,
            template=[("HAS_IDS", True), ("MERGE", True), ("M", num_columns)],
        )
    return values.reshape(R, -1), tokens.reshape(R, -1), stats.reshape(R, 2)


def _launch(
    logits: mx.array,  # [R, at least M]
    token_ids: mx.array,
    numbers: mx.array,
    *,
    num_blocks: int,
    template: list[tuple[str, mx.Dtype | int | bool]],
) -> list[mx.array]:
    """The lists and stats of all blocks: [R, blocks, 64] twice, [R, blocks, 2]."""
    R, width = logits.shape
    per_thread = -(-min(width, BLOCK) // _THREADS)
    return common.launch(
        KERNEL,
        [logits, token_ids, numbers],
        template=[*template, ("PER_THREAD", per_thread)],
        grid=(num_blocks * _THREADS, R, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[
            (R, num_blocks, common.LIST),
            (R, num_blocks, common.LIST),
            (R, num_blocks, 2),
        ],
        output_dtypes=[mx.float32, mx.int32, mx.float32],
    )
