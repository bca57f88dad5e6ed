"""Flags of mlx-lm's commands that mean nothing to the command of that name here.

Each with the reason, which ends up in one line. The server has a list of its own, since
it also meets vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_QUANTIZED_CACHE = "mlx-lm has no quantized cache for Gemma 4"
_NO_QUANTIZED_ACTIVATIONS = "activations keep the type of the checkpoint"

# What generates text knows them all, whichever of mlx-lm's programs has them.
TEXT_FLAGS: Mapping[str, str] = {
    "--image": "text only, the checkpoint's vision tower is left out",
    "--kv-bits": _NO_QUANTIZED_CACHE,
    "--kv-group-size": _NO_QUANTIZED_CACHE,
    "--quantized-kv-start": _NO_QUANTIZED_CACHE,
    "--max-kv-size": "Gemma 4 bounds its caches itself, and mlx-lm obeys that",
    "--min-tokens-to-keep": "--min-p always keeps one token, the most likely",
    "--quantize-activations": _NO_QUANTIZED_ACTIVATIONS,
    "-qa": _NO_QUANTIZED_ACTIVATIONS,
    "--use-default-chat-template": "the checkpoint's own template is always used",
    "--pipeline": "one machine runs the whole model",
}
CONVERSION_FLAGS: Mapping[str, str] = {
    "--quant-predicate": "which layers need more bits is decided by rules made for "
    "Gemma 4, and --dry-run shows what they choose",
    "--trust-remote-code": "nothing that a checkpoint brings is run",
}
