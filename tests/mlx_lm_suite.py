"""A pytest plugin: mlx-lm's own tests with the hook installed.

``scripts/mlx_lm_suite.py`` runs them, with the embedded pair in place of the model that
they would download. They take functions by mlx-lm's names; behind these is the hook.
"""

from __future__ import annotations

import os

import pytest

from mlx_gemma_mtp.hook.install import install

_LOOKS_AHEAD = (
    "counts the step that mlx-lm runs ahead of the last token; here processors see the "
    "histories of the tokens that come out, and no other"
)
_PRIVATE = "asks for private attributes of mlx-lm's class"
_OWN_CACHES = (
    "Gemma 4 makes its own caches, so that mlx-lm ignores max_kv_size (fails without "
    "the hook)"
)
_CHAT_MODEL = (
    "wants the embeddings of a Qwen model, and its answer (fails without the hook)"
)
_NO_QUANTIZED_CACHE = (
    "mlx-lm cannot quantize the caches of sliding layers (fails without the hook)"
)

# Cases that cannot apply, each with the reason. They run all the same and must fail:
# one that passes fails the run until it is taken off the list.
INAPPLICABLE = {
    "test_generate.py::TestGenerate": {
        "test_batch_max_kv_size_creates_rotating_cache": _OWN_CACHES,
        "test_batch_max_kv_size_none_creates_regular_cache": _OWN_CACHES,
        "test_batch_processor_survive_a_request_without_it": _LOOKS_AHEAD,
        "test_generate_with_processor": _LOOKS_AHEAD,
        "test_insert_validates_atomically": _PRIVATE,
        "test_remove_prompt_batch_updates_currently_processing": _PRIVATE,
        "test_stream_generate_input_embeddings": _CHAT_MODEL,
        "test_stream_generate_input_embeddings_prefill": _CHAT_MODEL,
    },
    "test_prompt_cache.py::TestPromptCache": {
        "test_cache_to_quantized": _NO_QUANTIZED_CACHE,
    },
    "test_server.py::TestServer": {
        "test_handle_completions": (
            "asks twice with a repetition penalty, which sees what the prompt cache "
            "does not hold: the small model's second text differs (fails without the "
            "hook)"
        ),
    },
    "test_server.py::TestServerKVCacheQuantization": {
        "test_completion_quantizes_the_cache": _NO_QUANTIZED_CACHE,
    },
}


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook before a test module takes names from mlx-lm."""
    if _is_hooked():
        install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the listed cases to fail.

    Raises:
        UsageError: One of them is no case any more.
    """
    if not _is_hooked():
        return
    found = {item.nodeid.rpartition("/")[2]: item for item in items}
    collected = {name.rpartition("::")[0] for name in found}
    for group, cases in INAPPLICABLE.items():
        for case, reason in cases.items() if group in collected else ():
            item = found.get(f"{group}::{case}")
            if item is None:
                raise pytest.UsageError(f"{group}::{case} is listed and not there")
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _is_hooked() -> bool:
    return not os.environ.get("MLX_LM_SUITE_PLAIN")
