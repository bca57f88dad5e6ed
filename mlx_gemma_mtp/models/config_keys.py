"""Single keys of a text model's settings, each read and checked.

Knows nothing of which keys make a target or a drafter, of files or of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..constants import FULL, LAYER_TYPES, MAX_INTEGER, SLIDING
from ..errors import CheckpointError, cut, shorten

# What a key means when the file does not have it: the defaults of transformers'
# Gemma4TextConfig. mlx-lm's own defaults are the E2B's settings and would build
# another model in silence.
_INTEGERS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
}
# Settings that can be off: 0 is allowed, and null in the file means 0.
_OPTIONAL_INTEGERS = {
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
_FLAGS = {
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}
_EXPERT_KEYS = ("num_experts", "top_k_experts", "moe_intermediate_size")
_ROPE_PARAMETERS: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}
# mlx-lm's model has these built in and reads no key for them.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": ("vision",),  # "all" is an encoder, not a decoder
}
# Far above any Gemma: what is larger is damage, and must not be allocated.
_MAX_LAYERS = 1000
_LAYERS_PER_FULL = 6  # without layer_types, every sixth layer is a full one
_GLOBAL_HEAD_DIM = 512
# What to do about a value that no model has, and about one that only others have.
DAMAGED = "Fetch the checkpoint's config.json again."
UNSUPPORTED = (
    "mlx-lm's Gemma 4 has nothing else: take a checkpoint that is built as the "
    "published ones are."
)


class KeyReader:
    """Reads and checks single keys of one JSON object."""

    def __init__(
        self, raw: Mapping[str, Any], defaults: Mapping[str, Any], source: str
    ) -> None:
        self.raw = raw
        self.defaults = defaults
        self.source = source

    def refuse_unsupported(self) -> None:
        """Refuse the few settings that mlx-lm's model does not read but that matter."""
        for key, allowed in _ONLY_VALUES.items():
            value = self.raw.get(key)
            if value is not None and value not in allowed:
                allowed_text = either([repr(v) for v in allowed])
                self.fail(key, allowed_text, value, next_step=UNSUPPORTED)

    def scalars(self) -> dict[str, Any]:
        """Return every key that holds a number or a flag and needs no other key."""
        text: dict[str, Any] = {}
        for key, value in _INTEGERS.items():
            text[key] = self.integer(key, self.defaults.get(key, value), minimum=1)
        for key, value in _OPTIONAL_INTEGERS.items():
            default = self.defaults.get(key, value)
            text[key] = self.integer(key, default, minimum=0, null=0)
        for key, flag in _FLAGS.items():
            text[key] = self.flag(key, flag)
        for key in _EXPERT_KEYS:
            # Read only where they are used: files without experts hold anything.
            moe = text["enable_moe_block"]
            text[key] = self.integer(key, None, minimum=1) if moe else None
        text["rms_norm_eps"] = self.positive("rms_norm_eps", 1e-6)
        text["final_logit_softcapping"] = self.positive("final_logit_softcapping", None)
        return text

    def integer(
        self, key: str, default: int | None, *, minimum: int, null: int | None = None
    ) -> int:
        """Return an integer; a null counts as ``null`` or else as missing."""
        value = self.raw.get(key, default)
        if value is None:
            value = default if null is None else null
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(key, f"an integer >= {minimum}", value)
        maximum = _MAX_LAYERS if key == "num_hidden_layers" else MAX_INTEGER
        if value > maximum:
            self.fail(key, f"an integer <= {maximum}", value)
        return int(value)

    def positive(self, key: str, default: float | None) -> float | None:
        """Return a number above 0, or the default where it is missing or null."""
        value = self.raw.get(key)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < MAX_INTEGER:  # NaN fails too
            self.fail(key, "a number above 0 or null", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a flag, or the default where it is missing or null."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.fail(key, "true or false", value)
        return bool(value)

    def layer_types(self, num_layers: int) -> list[str]:
        """Return the type of each layer."""
        types = self.raw.get("layer_types")
        if types is None:
            types = [
                FULL if (i + 1) % _LAYERS_PER_FULL == 0 else SLIDING
                for i in range(num_layers)
            ]
        if not isinstance(types, list) or len(types) != num_layers:
            self.fail("layer_types", f"a list of {num_layers} layer types", types)
        for i, layer_type in enumerate(types):
            if layer_type not in LAYER_TYPES:
                where, allowed = f"layer_types[{i}]", either(LAYER_TYPES)
                self.fail(where, allowed, layer_type, next_step=UNSUPPORTED)
        # As transformers does: the last layer is a full one whatever the file says.
        return [*types[:-1], FULL]

    def rope_parameters(self) -> dict[str, dict[str, Any]]:
        """Return rotary settings of both layer types.

        mlx-lm takes a theta of 10000 for a type that the file leaves out, which
        is wrong for full layers, so none may stay out.
        """
        found = self.raw.get("rope_parameters")
        found = {} if found is None else found
        if not isinstance(found, Mapping):
            self.fail("rope_parameters", "an object with one entry a layer type", found)
        rope: dict[str, dict[str, Any]] = {}
        for layer_type, default in _ROPE_PARAMETERS.items():
            entry = found.get(layer_type)
            entry = default if entry is None else entry
            if not isinstance(entry, Mapping) or not entry.get("rope_theta"):
                self.fail(f"rope_parameters.{layer_type}", "with a rope_theta", entry)
            self._check_rope(layer_type, entry)
            rope[layer_type] = dict(entry)
        return rope

    def _check_rope(self, layer_type: str, entry: Mapping[str, Any]) -> None:
        """Refuse numbers that would make tables of any size, or none."""
        for key, maximum in (("rope_theta", 1e12), ("partial_rotary_factor", 1.0)):
            value = entry.get(key)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= maximum):
                where = f"rope_parameters.{layer_type}.{key}"
                self.fail(where, f"above 0 and at most {maximum:g}", value)

    def full_layer_settings(self, text: Mapping[str, Any]) -> dict[str, int | None]:
        """Return head width and K/V heads of the full layers, from either layout."""
        overrides = self.raw.get("per_layer_config")
        if overrides is None:
            head_dim = self.integer(
                "global_head_dim", _GLOBAL_HEAD_DIM, minimum=1, null=text["head_dim"]
            )
            heads = self.raw.get("num_global_key_value_heads")
            if heads is not None:
                self.integer("num_global_key_value_heads", None, minimum=1)
        else:
            head_dim, heads = self._per_layer(overrides, text)
        # The published layout may carry the key where k_eq_v is off; it counts
        # for nothing there, in transformers as in mlx-lm.
        heads = heads if text["attention_k_eq_v"] else None
        return {"global_head_dim": head_dim, "num_global_key_value_heads": heads}

    def _per_layer(
        self, overrides: Any, text: Mapping[str, Any]
    ) -> tuple[int, int | None]:
        """Fold ``per_layer_config`` into (head_dim, K/V heads) of the full layers."""
        if not isinstance(overrides, Mapping):
            self.fail("per_layer_config", "an object of layers", overrides)
        by_layer: dict[int, Any] = {}
        for key, entry in overrides.items():
            is_number = str(key).isdecimal() and len(str(key)) <= 9
            if not is_number or not isinstance(entry, Mapping):
                constraint = "an object of layer number: settings"
                self.fail("per_layer_config", constraint, {key: entry})
            by_layer[int(key)] = entry  # int() also reads "05"
        seen = set()
        for i, layer_type in enumerate(text["layer_types"]):
            entry = by_layer.pop(i, {})
            self._check_override(i, layer_type, entry, text)
            if layer_type == FULL:
                seen.add((entry.get("head_dim"), entry.get("num_key_value_heads")))
        if by_layer or len(seen) != 1:
            constraint = "the same for every full layer"
            self.fail("per_layer_config", constraint, overrides, next_step=UNSUPPORTED)
        head_dim, heads = seen.pop()
        return head_dim or text["head_dim"], heads

    def _check_override(
        self, layer: int, layer_type: str, entry: Mapping[str, Any], text: Any
    ) -> None:
        """Refuse a per-layer setting that mlx-lm's model cannot follow."""
        for key, value in entry.items():
            free = {"head_dim"} if layer_type == FULL else set()
            if layer_type == FULL and text["attention_k_eq_v"]:
                free.add("num_key_value_heads")
            where = f"per_layer_config[{layer}].{key}"
            if key in free:
                KeyReader(entry, {}, self.source).integer(key, text[key], minimum=1)
            elif value is not None and value != text.get(key, self.raw.get(key)):
                constraint = f"as in the other layers ({shorten(text.get(key))})"
                self.fail(where, constraint, value, next_step=UNSUPPORTED)

    def fail(
        self, key: str, constraint: str, value: Any, *, next_step: str = DAMAGED
    ) -> None:
        """Raise the one error of this class."""
        raise CheckpointError(
            f"{cut(key)} in {cut(self.source)} must be {constraint}: got "
            f"{shorten(value)}. {next_step}"
        )


def either(names: Sequence[str]) -> str:
    """The names as a choice, in words."""
    return " or ".join(names) if len(names) < 3 else "one of " + ", ".join(names)
