"""What the load hook replaces in mlx-lm, and what it relies on there.

The tables are all that is known of mlx-lm's names; ``install`` holds them against the
installed version before it replaces anything. Knows no library.
"""

from __future__ import annotations

from dataclasses import dataclass

# The first mlx-lm whose generation has what the hook fills in for (StopSequences,
# streams of threads, statistics of batches).
OLDEST_VERSION = (0, 32)


@dataclass(frozen=True)
class Replaced:
    """One function or class that is replaced, and every module that keeps it.

    Attributes:
        module: Where it is defined; also where callers in that module look it up.
        name: Its name, in all of them.
        why: Why it is replaced.
        copies: Modules that import it by value. One that is imported later takes what
            stands in ``module`` by then, so it is in this list to be restored.
    """

    module: str
    name: str
    why: str
    copies: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module with the name."""
        return (self.module, *self.copies)


# ``mlx_lm.convert`` keeps mlx-lm's own ``load``: it never decodes, and mlx-lm imports
# it before any hook can be there. ``mlx_lm.generate`` and ``mlx_lm.batch_generate``
# look up ``stream_generate`` and ``BatchGenerator`` in their module when called.
REPLACED = (
    Replaced(
        "mlx_lm.utils",
        "load",
        "the model brings its drafter; `speculative_decoding` and `draft_model` say "
        "which",
        (
            "mlx_lm",
            "mlx_lm.benchmark",
            "mlx_lm.cache_prompt",
            "mlx_lm.chat",
            "mlx_lm.evaluate",
            "mlx_lm.fuse",
            "mlx_lm.generate",
            "mlx_lm.lora",
            "mlx_lm.perplexity",
            "mlx_lm.quant.awq",
            "mlx_lm.quant.dwq",
            "mlx_lm.quant.dynamic_quant",
            "mlx_lm.quant.gptq",
            "mlx_lm.server",
        ),
    ),
    Replaced(
        "mlx_lm.generate",
        "stream_generate",
        "decodes a model with its drafter; `mlx_lm.generate` calls it",
        ("mlx_lm", "mlx_lm.benchmark", "mlx_lm.chat", "mlx_lm.server"),
    ),
    Replaced(
        "mlx_lm.generate",
        "BatchGenerator",
        "the same for requests that join and leave; `mlx_lm.batch_generate` makes one",
        ("mlx_lm.server",),
    ),
    Replaced(
        "mlx.core.random",
        "seed",
        "a program that seeds MLX gets the same text again, whatever is drafted",
    ),
)

# Programs of mlx-lm that decode with what they load; the others need no drafter.
DECODING_PROGRAMS = ("benchmark", "chat", "evaluate", "generate", "server")

# How mlx-lm's functions must be called: those that are replaced, those whose keywords
# come along, and the shapes of what their callers read. Annotations are left out, and
# ... stands for a default that is no plain value.
SIGNATURES = {
    "mlx_lm.utils.load": (
        "(path_or_hf_repo, tokenizer_config=None, model_config=None, "
        "adapter_path=None, lazy=False, return_config=False, revision=None, "
        "trust_remote_code=False)"
    ),
    "mlx_lm.generate.stream_generate": (
        "(model, tokenizer, prompt, max_tokens=256, draft_model=None, stream=..., "
        "**kwargs)"
    ),
    "mlx_lm.generate.generate": "(model, tokenizer, prompt, verbose=False, **kwargs)",
    "mlx_lm.generate.batch_generate": (
        "(model, tokenizer, prompts, prompt_caches=None, max_tokens=128, "
        "verbose=False, return_prompt_caches=False, return_token_ids=False, "
        "return_logprobs=False, **kwargs)"
    ),
    "mlx_lm.generate.generate_step": (
        "(prompt, model, stream=..., *, max_tokens=256, sampler=None, "
        "logits_processors=None, max_kv_size=None, prompt_cache=None, "
        "prefill_step_size=2048, kv_bits=None, kv_group_size=64, "
        "quantized_kv_start=5000, prompt_progress_callback=None, "
        "input_embeddings=None)"
    ),
    "mlx_lm.generate.GenerationResponse": (
        "(text, token, logprobs, from_draft, prompt_tokens, prompt_tps, "
        "generation_tokens, generation_tps, peak_memory, finish_reason=None)"
    ),
    "mlx_lm.generate.BatchGenerator": (
        "(model, *, max_tokens=128, stop_tokens=None, sampler=None, "
        "logits_processors=None, completion_batch_size=32, prefill_batch_size=8, "
        "prefill_step_size=2048, max_kv_size=None, stream=None)"
    ),
    "mlx_lm.generate.BatchGenerator.insert": (
        "(self, prompts, max_tokens=None, caches=None, all_tokens=None, "
        "samplers=None, logits_processors=None, stop_sequences=None)"
    ),
    "mlx_lm.generate.BatchGenerator.insert_segments": (
        "(self, segments, max_tokens=None, caches=None, all_tokens=None, "
        "samplers=None, logits_processors=None, stop_sequences=None)"
    ),
    "mlx_lm.generate.BatchGenerator.next": "(self)",
    "mlx_lm.generate.BatchGenerator.next_generated": "(self)",
    "mlx_lm.generate.BatchGenerator.remove": (
        "(self, uids, return_prompt_caches=False)"
    ),
    "mlx_lm.generate.BatchGenerator.extract_cache": "(self, uids)",
    "mlx_lm.generate.BatchGenerator.stats": "(self)",
    "mlx_lm.generate.BatchGenerator.close": "(self)",
    "mlx_lm.generate.GenerationBatch.Response": (
        "(uid, token, logprobs, finish_reason, prompt_cache, all_tokens)"
    ),
    "mlx_lm.generate.PromptProcessingBatch.Response": (
        "(uid, progress, end_of_segment, end_of_prompt)"
    ),
    "mlx_lm.generate.StopSequences": "(stop_sequences=None)",
}
