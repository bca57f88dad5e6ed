"""What weights are packed by: QAT float ones load, other tools' formats are named.

Run: python -m pytest tests/test_packing.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from convert import stream
from convert.pipeline import convert, plan_conversion
from convert.request import NONE, PartRequest, Request
from mlx_gemma_mtp.checkpoints import packing, weights
from mlx_gemma_mtp.checkpoints.checkpoint import INDEX_NAME, TensorInfo, open_checkpoint
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.checkpoints.weights import load_drafter, load_target
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.pair.load import load
from mlx_gemma_mtp.pair.pair import pair_of
from tests.tiny import REFERENCE, model_folder

pytestmark = pytest.mark.usefixtures("plain_graphs")

FLOAT = PartRequest(is_quantized=False)
PROJECTION = "model.language_model.layers.1.mlp.up_proj"
UNUSED = "model.vision_tower.encoder.layers.0.mlp.up_proj"

# What has been seen beside bf16 weights, and what programs leave there.
STALE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "published": lambda c: c.update(quantization_config={"quant_type": "q4_0"}),
    "a method": lambda c: c.update(quantization_config={"quant_method": "gemma_qat"}),
    "text": lambda c: c["text_config"].update(quantization_config={"quant_type": "x"}),
    "null": lambda c: c.update(quantization_config=None, quantization=None),
    "empty": lambda c: c.update(quantization_config={}, quantization={}),
    "merged": lambda c: c.update(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "ours": lambda c: c.update(quantization={"bits": 4, "group_size": 64}),
    "theirs": lambda c: c.update(
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}
    ),
    "a word": lambda c: c.update(quantization_config="q4_0", quantization="q4_0"),
    "a list": lambda c: c.update(quantization_config=["q4_0"]),
    "a number": lambda c: c.update(quantization_config=4, compression_config=4),
    "a flag": lambda c: c.update(quantization_config=True),
    "a word in the text": lambda c: c["text_config"].update(
        quantization_config="q4_0", compression_config={"bits": 4}
    ),
}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    stored: Any = mx.load(str(folder / "model.safetensors"))
    tensors = {name: mx.array(array) for name, array in stored.items()}
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / INDEX_NAME).unlink(missing_ok=True)


def parameters(model: nn.Module) -> dict[str, Any]:
    leaves: Any = tree_flatten(model.parameters())
    return dict(leaves)


def equal(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = parameters(model), parameters(other)
    return set(ours) == set(theirs) and all(
        mx.array_equal(ours[name], theirs[name]) for name in ours
    )


# Float checkpoints


@pytest.mark.parametrize("stale", STALE)
def test_a_float_checkpoint_is_float_whatever_its_config_says(tmp_path, stale):
    folder = model_folder(tmp_path / "pair", "12b")
    for part in (folder, folder / "drafter"):
        edit_config(part, STALE[stale])
    assert equal(load_target(folder), load_target(REFERENCE / "12b" / "target"))
    own = load_drafter(REFERENCE / "12b" / "drafter")
    assert equal(load_drafter(folder / "drafter"), own)
    model, tokenizer = load(folder)
    assert equal(model, load_target(folder))
    assert pair_of(model).drafter is not None
    assert tokenizer.bos_token_id is not None


@pytest.mark.parametrize("stale", STALE)
def test_a_conversion_takes_it_and_forgets_the_key(tmp_path, stale):
    folder = model_folder(tmp_path / "pair", "e2b")
    for part in (folder, folder / "drafter"):
        edit_config(part, STALE[stale])
    place = tmp_path / "out"
    request = Request(folder, place, target=FLOAT, drafter=FLOAT, has_check=False)
    convert(plan_conversion(request))
    assert equal(load_target(place), load_target(folder))
    assert equal(load_drafter(place / "drafter"), load_drafter(folder / "drafter"))
    for part in (place, place / "drafter"):
        config = json.loads((part / "config.json").read_text())
        for settings in (config, config["text_config"]):
            assert not [key for key in settings if "quant" in key or "compr" in key]


def test_a_conversion_quantizes_it(tmp_path):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    edit_config(folder, STALE["published"])
    place, wanted = tmp_path / "out", PartRequest(format=Format(4, 32))
    request = Request(folder, place, draft_model=NONE, target=wanted, has_check=False)
    convert(plan_conversion(request))
    embedding = parameters(load_target(place))
    assert "language_model.model.embed_tokens.scales" in embedding
    config = json.loads((place / "config.json").read_text())
    assert config["quantization_config"] == config["quantization"]
    assert config["quantization"]["bits"] == 4


# Other tools


def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.zeros(shape, dtype)


def packed(**parts: mx.array) -> Callable[[dict[str, Any]], Any]:
    """Put tensors in the place of a projection's weight."""

    def change(tensors: dict[str, Any]) -> None:
        if "weight" not in parts:
            del tensors[f"{PROJECTION}.weight"]
        tensors.update(
            {f"{PROJECTION}.{k.replace('__', '.')}": v for k, v in parts.items()}
        )

    return change


BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
I32, I8, U8 = mx.int32, mx.int8, mx.uint8
WORDS, SCALES = zeros((64, 8), I32), zeros((64, 2), F16)
BYTES, FEW = zeros((64, 32), U8), zeros((64, 4), U8)

# name in the message: (the method configs name, its tensors)
FORMATS: dict[str, tuple[dict[str, Any] | None, Callable[[dict[str, Any]], Any]]] = {
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        packed(qweight=WORDS, qzeros=WORDS, scales=SCALES, g_idx=zeros((64,), I32)),
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        packed(qweight=WORDS, qzeros=WORDS, scales=SCALES),
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        packed(weight_packed=WORDS, weight_scale=SCALES, weight_shape=zeros((2,), I32)),
    ),
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        packed(
            weight=BYTES,
            weight_scale=FEW,
            weight_scale_2=zeros((), F32),
            input_scale=zeros((), F32),
        ),
    ),
    "FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        packed(weight=zeros((128, 64), U8), weight_scale_inv=zeros((1, 1), F32)),
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        packed(
            weight=zeros((4096, 1), U8),
            weight__absmax=zeros((128,), F32),
            weight__quant_map=zeros((16,), F32),
            weight__quant_state__bitsandbytes__nf4=zeros((80,), U8),
        ),
    ),
    "HQQ": (
        {"quant_method": "hqq"},
        packed(W_q=BYTES, scale=SCALES, zero=SCALES),
    ),
    "quanto": (
        {"quant_method": "quanto"},
        packed(weight___data=zeros((128, 64), I8), weight___scale=SCALES),
    ),
    "torchao": (
        {"quant_method": "torchao"},
        packed(_weight_qdata=zeros((128, 64), I8), _weight_scale=SCALES),
    ),
    "AQLM": (
        {"quant_method": "aqlm"},
        packed(codes=BYTES, codebooks=SCALES, scales=SCALES),
    ),
    "QuIP#": (
        {"quant_method": "quip"},
        packed(Qidxs=WORDS, SU=SCALES, SV=SCALES),
    ),
    "VPTQ": (
        {"quant_method": "vptq"},
        packed(indices=WORDS, centroids__weight=SCALES),
    ),
    "ExLlamaV2": (
        {"quant_method": "exl2"},
        packed(q_weight=WORDS, q_scale=WORDS, q_groups=WORDS),
    ),
    "ExLlamaV3": (
        {"quant_method": "exl3"},
        packed(trellis=WORDS, suh=SCALES, svh=SCALES),
    ),
    "SpQR": (
        {"quant_method": "spqr"},
        packed(dense_weights=WORDS, row_offsets=WORDS),
    ),
    "FP-Quant": (
        {"quant_method": "fp_quant"},
        packed(qweight=BYTES, scales=FEW, forward_hadamard_matrix=SCALES),
    ),
    "HIGGS": (
        {"quant_method": "higgs"},
        packed(weight=BYTES, scales=SCALES, tables=SCALES, tables2=SCALES),
    ),
    "EETQ": (
        {"quant_method": "eetq"},
        packed(weight=zeros((64, 128), I8), weight_scales=SCALES),
    ),
}
# Beside weights that are float, and changed for them.
FAKE = {
    "ModelOpt": packed(
        weight=zeros((128, 64), BF16), input_quantizer___amax=zeros((1,), F32)
    ),
    "AWQ of ModelOpt": packed(
        weight=zeros((128, 64), BF16), pre_quant_scale=zeros((64,), BF16)
    ),
}
# What no tensor's name tells, and the config does.
NAMED = {
    "bitnet": packed(weight=BYTES, weight_scale=zeros((1,), F32)),
    "quark": packed(weight=WORDS, weight_scale=SCALES),
    "of tomorrow": packed(some_words=WORDS, some_scales=SCALES),
    "mxfp4": packed(proj_blocks=BYTES, proj_scales=FEW),
}


def refused(call: Callable[[], Any], *words: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert str(word) in message
    assert "\n" not in message
    assert len(message) < 600
    assert "again" not in message
    assert "unquantized" not in message  # never what may have been given
    return message


def check_refused(folder: Path, *words: object) -> None:
    """Loader and converter say the same of a target."""
    said = refused(lambda: load_target(folder), folder, *words)
    request = Request(folder, folder.parent / "out", draft_model=NONE)
    assert refused(lambda: plan_conversion(request, headers_only=True)) == said


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("tool", FORMATS)
def test_another_tools_format_is_named(tmp_path, tool, has_config):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    settings, change = FORMATS[tool]
    edit_weights(folder, change)
    if has_config:
        edit_config(folder, lambda c: c.update(quantization_config=settings))
    check_refused(folder, tool, PROJECTION, "mlx_gemma_mtp.convert", "mlx-community")


@pytest.mark.parametrize("tool", FAKE)
def test_float_weights_that_were_changed_are_named(tmp_path, tool):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    edit_weights(folder, FAKE[tool])
    check_refused(folder, "ModelOpt", PROJECTION)


@pytest.mark.parametrize("method", NAMED)
def test_a_method_that_the_config_names_is_named(tmp_path, method):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    edit_weights(folder, NAMED[method])
    edit_config(
        folder, lambda c: c.update(quantization_config={"quant_method": method})
    )
    said = refused(lambda: load_target(folder), method, "mlx_gemma_mtp.convert")
    assert "Take config.json" not in said
    request = Request(folder, folder.parent / "out", draft_model=NONE)
    plan = lambda: plan_conversion(request, headers_only=True)  # noqa: E731
    refused(plan, method, "mlx_gemma_mtp.convert")


def test_scales_of_a_quantized_cache_are_left_out(tmp_path):
    """Exports for FP8 caches have them beside float weights."""
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    base = "model.language_model.layers.1"
    names = ("self_attn.k_scale", "self_attn.v_proj.v_scale", "mlp.up_proj.input_scale")
    scales = {f"{base}.{name}": zeros((1,), F32) for name in names}
    edit_weights(folder, lambda tensors: tensors.update(scales))
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    assert equal(load_target(folder), load_target(REFERENCE / "12b" / "target"))


@pytest.mark.parametrize("tool", FORMATS)
def test_a_drafter_in_another_tools_format_is_named(tmp_path, tool):
    folder = model_folder(tmp_path / "pair", "12b")
    change = FORMATS[tool][1]

    def renamed(tensors: dict[str, Any]) -> None:
        ours = {
            f"{PROJECTION}.weight": tensors.pop("model.layers.1.mlp.up_proj.weight")
        }
        change(ours)
        own = PROJECTION.replace("language_model.", "")
        tensors.update({k.replace(PROJECTION, own): v for k, v in ours.items()})

    edit_weights(folder / "drafter", renamed)
    refused(lambda: load_drafter(folder / "drafter"), folder / "drafter", tool)


@pytest.mark.parametrize(
    "dtype",
    [
        *("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"),
        *("F4", "I16", "U16", "I32", "U32"),
    ],
)
def test_a_type_that_no_weights_have_is_told(tmp_path, dtype):
    """MLX has no arrays of some of these types, so only the header says them."""
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, bits = (
        json.loads(raw[8:start]),
        {"I32": 32, "U32": 32, "I16": 16, "U16": 16, "F4": 4}.get(dtype, 8),
    )
    entry = header[f"{PROJECTION}.weight"]
    first, end = entry["data_offsets"]
    columns = (end - first) * 8 // bits // entry["shape"][0]
    entry.update(dtype=dtype, shape=[entry["shape"][0], columns])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    check_refused(folder, dtype, f"{PROJECTION}.weight")
    edit_config(
        folder, lambda c: c.update(quantization_config={"quant_method": "modelopt"})
    )
    check_refused(folder, "ModelOpt")


@pytest.mark.parametrize("dtype", [mx.uint64, mx.int64, mx.complex64, mx.uint16])
def test_a_drafter_of_a_type_that_no_weights_have_is_told(tmp_path, dtype):
    folder = model_folder(tmp_path / "pair", "12b") / "drafter"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda t: t.update({name: t[name].astype(dtype)}))
    refused(lambda: load_drafter(folder), folder, name, "weights of type")


def test_one_tensor_per_expert_is_told(tmp_path):
    folder = model_folder(tmp_path / "pair", "26b-a4b", has_drafter=False)
    base = "model.language_model.layers.0.experts"

    def unstack(tensors: dict[str, Any]) -> None:
        for i, down in enumerate(tensors.pop(f"{base}.down_proj")):
            tensors[f"{base}.{i}.down_proj.weight"] = down

    edit_weights(folder, unstack)
    check_refused(folder, "one tensor per expert", "experts.gate_up_proj")


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{PROJECTION}.base_layer.weight",
        f"base_model.model.{PROJECTION}.lora_A.default.weight",
        f"{PROJECTION}.lora_B.weight",
        f"{PROJECTION}.hada_w1_a",
        f"{PROJECTION}.lokr_w1",
    ],
)
def test_a_model_with_adapters_in_it_is_told(tmp_path, name):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    edit_weights(folder, lambda tensors: tensors.update({name: zeros((4, 4), BF16)}))
    check_refused(folder, "PEFT", "merge_and_unload")


def test_a_model_with_mlx_lms_adapters_in_it_is_told(tmp_path):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)

    def wrap(tensors: dict[str, Any]) -> None:
        tensors[f"{PROJECTION}.linear.weight"] = tensors.pop(f"{PROJECTION}.weight")
        tensors[f"{PROJECTION}.lora_a"] = zeros((64, 8), BF16)

    edit_weights(folder, wrap)
    check_refused(folder, "mlx-lm's adapters", "mlx_lm.fuse")


def test_the_surest_sign_counts_whatever_stands_first():
    """An expert's packed weight has its own name; what packed it is said beside it."""
    base = "model.language_model.layers.0.experts.0.up_proj"
    names = [f"{base}.weight", f"{base}.weight_scale", f"{base}.weight_scale_2"]
    tensors = {
        name: TensorInfo(Path("model.safetensors"), dtype, (1,), (0, 1))
        for name, dtype in zip(names, ["U8", "F8_E4M3", "F32"], strict=True)
    }
    checkpoint = open_checkpoint(REFERENCE / "12b" / "target")
    checkpoint.tensors.update(tensors)
    refused(lambda: packing.check_packing(checkpoint), "ModelOpt", names[2])


def test_how_image_input_is_packed_does_not_matter(tmp_path):
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    packed_tower = {
        f"{UNUSED}.weight": zeros((64, 1), U8),
        f"{UNUSED}.weight.absmax": zeros((4,), F32),
    }
    edit_weights(folder, lambda tensors: tensors.update(packed_tower))
    assert equal(load_target(folder), load_target(REFERENCE / "12b" / "target"))


# MLX's own


@pytest.mark.parametrize("config", [None, {"bits": 8, "group_size": 64}, "wrong"])
def test_the_tensors_tell_how_mlx_has_packed(tmp_path, config):
    """The map of a config has been seen lost, wrong, and beside a regime's name."""
    folder = model_folder(tmp_path / "pair", "26b-a4b", has_drafter=False)
    place = tmp_path / "out"
    wanted = PartRequest(format=Format(4, 32))
    request = Request(folder, place, draft_model=NONE, target=wanted, has_check=False)
    convert(plan_conversion(request))
    expected = load_target(place)
    edit_config(place, lambda c: c.update(quantization=config))
    edit_config(place, lambda c: c.update(quantization_config={"quant_type": "q4_0"}))
    assert equal(load_target(place), expected)
    router: Any = expected.layers[0].router.proj
    assert (router.bits, router.group_size) == (8, 64)


@pytest.mark.parametrize("head", ["lm_head.", "language_model.lm_head."])
def test_a_head_of_its_own_is_converted_and_read(tmp_path, head):
    """Float, then quantized, then quantized in the place where transformers has it."""
    folder = model_folder(tmp_path / "pair", "12b", has_drafter=False)
    embedding = "model.language_model.embed_tokens.weight"
    edit_weights(folder, lambda t: t.update({f"{head}weight": t[embedding] * 2}))
    edit_config(folder, lambda c: c.update(tie_word_embeddings=False))
    place, again = tmp_path / "out", tmp_path / "again"
    wanted = PartRequest(format=Format(8, 32))
    said = convert(plan_conversion(Request(folder, place, NONE, target=wanted)))
    assert not isinstance(said, str)  # compared
    expected = parameters(load_target(place))
    own = "language_model.lm_head."
    head_matrix = expected[f"{own}weight"], expected[f"{own}scales"]
    found = mx.dequantize(*head_matrix, expected[f"{own}biases"], group_size=32, bits=8)
    source: Any = mx.load(str(folder / "model.safetensors"))
    assert mx.allclose(found, source[f"{head}weight"], atol=1e-2)

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(own)]:
            tensors[name.replace(own, head)] = tensors.pop(name)

    edit_weights(place, rename)
    loaded = parameters(load_target(place))
    assert set(loaded) == set(expected)
    assert all(mx.array_equal(loaded[name], expected[name]) for name in loaded)
    convert(plan_conversion(Request(place, again, NONE, has_check=False)))
    kept = parameters(load_target(again))
    assert all(mx.array_equal(kept[name], expected[name]) for name in expected)


def with_head(tensors: dict[str, Any], factor: float) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = (embedding * factor).astype(embedding.dtype)


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model."])
def test_a_drafters_head_that_is_its_embedding_again(tmp_path, prefix):
    """It says that it is not tied, and is; what is converted says so."""
    folder = model_folder(tmp_path / "pair", "12b")
    place = folder / "drafter"
    expected = load_drafter(place)
    edit_weights(place, lambda tensors: with_head(tensors, 1))

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[f"{prefix}{name}"] = tensors.pop(name)

    edit_weights(place, rename)
    edit_config(place, lambda c: c.update(tie_word_embeddings=False))
    assert equal(load_drafter(place), expected)
    request = Request(
        folder, tmp_path / "out", target=FLOAT, drafter=FLOAT, has_check=False
    )
    convert(plan_conversion(request))
    assert equal(load_drafter(tmp_path / "out" / "drafter"), expected)


@pytest.mark.parametrize("factor", [2, None])
def test_a_drafters_head_of_its_own_is_told(tmp_path, factor):
    folder = model_folder(tmp_path / "pair", "12b") / "drafter"
    if factor is not None:
        edit_weights(folder, lambda tensors: with_head(tensors, factor))
    edit_config(folder, lambda c: c.update(tie_word_embeddings=False))
    refused(lambda: load_drafter(folder), folder, "tie_word_embeddings")


@pytest.fixture
def global_scales(tmp_path):
    """A mixture in nvfp4 with a scale for each expert, as mlx-lm writes it."""
    model = load_target(REFERENCE / "26b-a4b" / "target")
    config = json.loads((REFERENCE / "26b-a4b/target/config.json").read_text())
    model, config = mlx_lm.utils.quantize_model(
        model, config, None, None, mode="nvfp4", global_scale=True
    )
    folder = model_folder(tmp_path / "nvfp4", "26b-a4b", has_drafter=False)
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config(config, folder / "config.json")
    return model, folder


needs_global_scale = pytest.mark.skipif(
    "global_scale" not in mlx_lm.utils.quantize_model.__annotations__,
    reason="this mlx-lm writes and reads no global_scale",
)


@needs_global_scale
class TestGlobalScale:
    @pytest.mark.parametrize("has_map", [True, False])
    def test_is_read_as_mlx_lm_reads_it(self, global_scales, monkeypatch, has_map):
        model, folder = global_scales
        monkeypatch.setattr(weights, "_check_device", lambda *args: None)
        if not has_map:
            edit_config(folder, lambda c: c.pop("quantization"))
            edit_config(folder, lambda c: c.pop("quantization_config"))
        loaded = load_target(folder)
        assert equal(loaded, model)
        experts: Any = loaded.layers[0].experts.switch_glu.up_proj
        assert experts.global_scale.shape == (experts.num_experts,)

    def test_needs_a_gpu(self, global_scales):
        refused(lambda: load_target(global_scales[1]), "global_scale", "GPU")

    def test_stays_in_a_conversion(self, global_scales, monkeypatch, tmp_path):
        model, folder = global_scales
        monkeypatch.setattr(weights, "_check_device", lambda *args: None)
        place = tmp_path / "out"
        request = Request(folder, place, draft_model=NONE)
        said = convert(plan_conversion(request))
        assert "GPU" in str(said)  # not compared on a CPU
        assert equal(load_target(place), model)
        loaded, _ = mlx_lm.utils.load_model(place)
        assert equal(loaded, model)

    def test_is_part_of_what_is_written_in_full(
        self, global_scales, monkeypatch, tmp_path
    ):
        model, folder = global_scales
        place = tmp_path / "out"
        monkeypatch.setattr(stream, "BLOCK_BYTES", 20_000)  # several for each expert
        request = Request(
            folder, place, draft_model=NONE, is_dequantized=True, dtype="float32"
        )
        convert(plan_conversion(request))
        experts = model.layers[0].experts.switch_glu.up_proj
        expected = [
            mx.dequantize(w, s, None, 16, 4, "nvfp4", scale)
            for w, s, scale in zip(
                experts.weight, experts.scales, experts.global_scale, strict=True
            )
        ]
        whole: Any = load_target(place).layers[0].experts.switch_glu.up_proj
        assert mx.array_equal(whole.weight, mx.stack(expected).astype(mx.float32))

    def test_of_another_matrix_is_told(self, global_scales):
        name = "language_model.model.layers.0.self_attn.q_proj.global_scale"
        folder = global_scales[1]
        edit_weights(folder, lambda t: t.update({name: zeros((1,), F32)}))
        check_refused(folder, "nvfp4", "global_scale", "q_proj")

    def test_of_an_mlx_lm_that_does_not_know_it(self, global_scales, monkeypatch):
        def to_quantized(self, group_size=64, bits=4, mode="affine"):
            raise AssertionError

        monkeypatch.setattr(SwitchLinear, "to_quantized", to_quantized)
        message = "global_scale for this mlx-lm"
        refused(lambda: load_target(global_scales[1]), message)
