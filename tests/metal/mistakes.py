"""Mistakes to seed into the toy kernel, by what finds them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.metal.toy import TOY, ToyKernel

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_MAX = "float simd_largest = simd_max(largest);"
SIMD_SUM = "float simd_total = simd_sum(rescaled);"
FIRST_LOOP = "index = NO_INDEX;\n    for (uint i = thread_id; i < V;"
SECOND_LOOP = "// Second pass.\n    for (uint i = thread_id; i < V;"
LAST_WRITE = "if (thread_id == 0) {\n        argmax[row]"


@dataclass(frozen=True)
class Mistake:
    """One change of the toy's source; ``error`` is what a MetalError must match."""

    name: str
    old: str
    new: str
    error: str = ""

    @property
    def kernel(self) -> ToyKernel:
        """The toy with this mistake."""
        return TOY.but(self.old, self.new)


# The launch stops and names the place.
STOPPING = (
    Mistake(
        "barrier inside a branch",
        BARRIER,
        f"if (thread_id < 200) {BARRIER}",
        r"divergent \w+ at line \d+ `.*(simd_max|thread_id < 200)",
    ),
    Mistake(
        "early return before a simd function",
        SIMD_MAX,
        f"if (thread_id % 32 >= 24) return;\n    {SIMD_MAX}",
        r"divergent simd_max at line .*: thread \d+ has returned",
    ),
    Mistake(
        "early return of simdgroups before a barrier",
        SIMD_MAX,
        f"if (thread_id >= 224) return;\n    {SIMD_MAX}",
        r"divergent threadgroup_barrier at line .*: thread 224 has returned",
    ),
    Mistake(
        "simd function in a divergent branch",
        SIMD_SUM,
        "float simd_total = 0;\n    if (lane < 20) simd_total = simd_sum(rescaled);",
        r"divergent .*simd_sum",
    ),
    Mistake(
        "shuffle by some lanes only",
        SIMD_SUM,
        f"{SIMD_SUM}\n    if (lane == 31) simd_total = simd_shuffle_up(simd_total, 1);",
        r"divergent .*simd_shuffle_up",
    ),
    Mistake(
        "threadgroup array too small",
        "threadgroup float group_sum[32];",
        "threadgroup float group_sum[4];",
        r"memory fault: threadgroup array 'group_sum' of line .* at byte \d+ of 16",
    ),
    Mistake(
        "threadgroup memory over 32 KiB",
        "threadgroup float group_sum[32];",
        "threadgroup float group_sum[8192];",
        r"threadgroup memory must be at most 32 KiB: got \d+ bytes",
    ),
    Mistake(
        "read past the end of an input",
        FIRST_LOOP,
        FIRST_LOOP.replace("i < V", "i <= V"),
        r"memory fault: buffer 'logits' at byte 60000 of 60000",
    ),
    Mistake(
        "write past the end of an output",
        "probs[row * V + i]",
        "probs[row * V + i + 8]",
        r"memory fault: buffer 'probs' at byte 600\d\d of 60000",
    ),
    Mistake(
        "write past the end within its alignment",
        LAST_WRITE,
        f"if (thread_id == 0) logsumexp[3] = 0.0f;\n    {LAST_WRITE}",
        r"buffer 'logsumexp' written up to 16 bytes past its end",
    ),
    Mistake(
        "write to an input",
        LAST_WRITE,
        f"if (thread_id == 0) ((device T*)row_logits)[0] = 0;\n    {LAST_WRITE}",
        r"memory fault: buffer 'logits' at byte \d+ of 60000",
    ),
    Mistake(
        "division of an integer by zero",
        LAST_WRITE,
        f"row_index /= logits_shape[0] - 3;\n    {LAST_WRITE}",
        r"division of an integer by zero",
    ),
)

# The launch ends, with outputs that are wrong or that depend on the schedule.
WRONG = (
    Mistake("barrier removed", BARRIER, ""),
    Mistake(
        "simdgroup barrier in place of a threadgroup's",
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Mistake(
        "threadgroup memory read that nobody wrote",
        "lane < num_simdgroups ? group_sum[lane] : 0.0f",
        "group_sum[lane]",
    ),
    Mistake(
        "tail not written",
        SECOND_LOOP,
        SECOND_LOOP.replace("i < V", "i < V / 32 * 32"),
    ),
    Mistake(
        "a simdgroup's result missing",
        "if (lane == 0) {",
        "if (lane == 0 && simdgroup) {",
    ),
    Mistake("sum not rescaled", "sum *= metal::exp(largest - logit);", ""),
    Mistake(
        "all simdgroups write one cell",
        LAST_WRITE,
        LAST_WRITE.replace("thread_id == 0", "lane == 0").replace(
            "{", "{\n        row_index += simdgroup;"
        ),
    ),
    Mistake(
        "the last of equal logits",
        "simd_min(largest == simd_largest ? index : NO_INDEX)",
        "simd_max(largest == simd_largest ? index : 0u)",
    ),
    Mistake(
        "shuffle from a lane that does not exist",
        SIMD_SUM,
        f"{SIMD_SUM}\n    simd_total += 0.0f * simd_shuffle_up(simd_total, 1);",
    ),
    Mistake(
        "threadgroup memory reused without a barrier",
        "// Second pass.",
        "if (lane == 0) group_max[simdgroup] = 0.0f;",
    ),
)

# Races: what ThreadSanitizer must report of them.
RACING = (
    Mistake(
        "barrier that orders no memory",
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_none);",
        r"write at line \d+ `group_max\[simdgroup\]",
    ),
    Mistake(
        "barrier removed", BARRIER, "", r"write at line \d+ `group_max\[simdgroup\]"
    ),
    Mistake(
        "simdgroup barrier in place of a threadgroup's",
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        r"write at line \d+ `group_max\[simdgroup\]",
    ),
    Mistake(
        "threadgroup memory reused without a barrier",
        "// Second pass.",
        "if (lane == 0) group_max[simdgroup] = 0.0f;",
        r"write at line \d+ `if \(lane == 0\) group_max\[simdgroup\]",
    ),
    Mistake(
        "all simdgroups write one cell, and the same value",
        LAST_WRITE,
        LAST_WRITE.replace("thread_id == 0", "lane == 0"),
        r"write at line \d+ `argmax\[row\].*write at line \d+ `argmax\[row\]",
    ),
    Mistake(
        "all threadgroups write one cell",
        LAST_WRITE,
        f"if (thread_id == 0) logsumexp[0] = 0.0f;\n    {LAST_WRITE}",
        r"write at line \d+ .*logsumexp\[0\].*",
    ),
)

SPIN = Mistake(
    "wait for another thread in a loop",
    BARRIER,
    "while (*(volatile threadgroup uint*)group_index == NO_INDEX) {}",
    r"the launch must end within 1 s",
)


# What g++ accepts and Metal's compiler does not: what the lint must say of it.
REFUSED_BY_METAL = (
    Mistake(
        "device pointer given for a threadgroup pointer",
        LAST_WRITE,
        f"auto read = [](threadgroup float* p) {{ return p[0]; }};\n"
        f"    read(logsumexp);\n    {LAST_WRITE}",
        r"no matching function for call to object of type",
    ),
    Mistake(
        "threadgroup pointer given for a thread pointer",
        LAST_WRITE,
        f"auto read = [](thread float* p) {{ return p[0]; }};\n"
        f"    read(group_sum);\n    {LAST_WRITE}",
        r"no matching function for call to object of type",
    ),
    Mistake(
        "local pointer without address space",
        "const device T* row_logits",
        "const T* row_logits",
        r"pointer or reference without address space: row_logits",
    ),
    Mistake(
        "parameter without address space",
        LAST_WRITE,
        f"auto read = [](float& x) {{ return x; }};\n    read(sum);\n    {LAST_WRITE}",
        r"pointer or reference without address space: x",
    ),
    Mistake(
        "write to an input",
        LAST_WRITE,
        f"row_logits[0] = T(0);\n    {LAST_WRITE}",
        r"read-only variable is not assignable",
    ),
    Mistake(
        "double literal",
        "+ metal::log(row_sum);",
        "+ 1.0 * metal::log(row_sum);",
        r"increases floating-point precision: 'float' to 'double'",
    ),
    Mistake("double variable", "float sum = 0.0f;", "double sum = 0.0f;", r"double"),
    Mistake(
        "unknown function",
        SIMD_MAX,
        SIMD_MAX.replace("simd_max", "simd_maximum"),
        r"use of undeclared identifier 'simd_maximum'",
    ),
    Mistake(
        "attribute that MLX does not pass",
        "lane = thread_index_in_simdgroup",
        "lane = simd_lane_id",
        r"use of undeclared identifier 'simd_lane_id'",
    ),
    Mistake(
        "standard library of C++",
        "sum *= metal::exp(",
        "sum *= std::exp(",
        r"use of undeclared identifier 'std'",
    ),
)
