"""Plans: names, formats, files, and the published checkpoints by their headers.

No weights: what is compared are names, shapes and bytes.

Run: python -m pytest tests/convert/test_plan.py
"""

from __future__ import annotations

import gc
import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4, gemma4_text

from convert import quantize, safetensors
from convert.__main__ import main
from convert.pipeline import plan_conversion
from convert.plan import Array
from convert.planner import plan_drafter, plan_target
from convert.quantize import DRAFTER, TARGET, Choice
from convert.report import groups
from convert.request import PartRequest, Request
from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS, open_checkpoint
from mlx_gemma_mtp.checkpoints.quantization import MODES, Format
from mlx_gemma_mtp.checkpoints.weights import (
    drafter_skeleton,
    target_settings,
    target_skeleton,
)
from mlx_gemma_mtp.errors import CheckpointError, RequestError
from mlx_gemma_mtp.models.tensor_names import (
    Share,
    drafter_names,
    target_names,
    tensor_name,
)
from tests.published import (
    TARGETS,
    published,
    tensor_bytes,
    without_shared_kv,
    write_headers,
)
from tests.tiny import FAMILIES, REFERENCE

KEPT = PartRequest(is_quantized=False)
REQUESTS = {
    "default": PartRequest(),
    "float": KEPT,
    **{mode: PartRequest(format=Format.of_mode(mode)) for mode in MODES},
    **{f"affine-{bits}": PartRequest(format=Format(bits, 64)) for bits in (2, 3, 5)},
    "affine-g128": PartRequest(format=Format(6, 128)),
}


# Names


def settings_of(checkpoint):
    settings = target_settings(checkpoint)
    is_text_only = settings["model_type"] == "gemma4_text"
    return settings if is_text_only else settings["text_config"], is_text_only


def sanitized(checkpoint, shapes):
    """Names and shapes that mlx-lm makes of tensors."""
    settings = target_settings(checkpoint)
    is_text_only = settings["model_type"] == "gemma4_text"
    module = gemma4_text if is_text_only else gemma4
    model = module.Model(module.ModelArgs.from_dict(settings))
    lazy = {name: mx.zeros(shape) for name, shape in shapes.items()}
    return {name: array.shape for name, array in model.sanitize(lazy).items()}


def mapped(checkpoint, shapes):
    """Names and shapes that the converter makes of tensors."""
    text, is_text_only = settings_of(checkpoint)
    names = target_names(shapes, text, is_text_only=is_text_only)
    assert set(names.unused) | {s.tensor for s in names.parameters.values()} == set(
        shapes
    )
    found = {}
    for name, share in names.parameters.items():
        shape = list(shapes[share.tensor])
        if share.count > 1:
            shape[-2] //= share.count
        found[name] = tuple(shape)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_mlx_lm(family):
    checkpoint = open_checkpoint(REFERENCE / family / "target")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert mapped(checkpoint, shapes) == sanitized(checkpoint, shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_mlx_lm_stay(family):
    """What mlx-lm makes of a checkpoint goes through both again as it is."""
    checkpoint = open_checkpoint(REFERENCE / family / "target")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    once = sanitized(checkpoint, shapes)
    assert mapped(checkpoint, once) == once == sanitized(checkpoint, once)


@pytest.mark.parametrize("family", ["e2b", "e4b"])
def test_unused_kv_is_left_out_as_mlx_lm_does(family):
    checkpoint = open_checkpoint(REFERENCE / family / "target")
    text, _ = settings_of(checkpoint)
    assert text["num_kv_shared_layers"]
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    last = f"model.language_model.layers.{text['num_hidden_layers'] - 1}.self_attn"
    for part in ("k_proj", "v_proj", "k_norm"):
        shapes[f"{last}.{part}.weight"] = (16, 64)
    shapes["model.vision_tower.patch_embedder.weight"] = (2, 2)
    shapes["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    assert mapped(checkpoint, shapes) == sanitized(checkpoint, shapes)


def text_only(folder, family, model_type):
    """The text model alone, as ``Gemma4ForCausalLM`` saves it: headers only."""
    checkpoint = open_checkpoint(REFERENCE / family / "target")
    config = {**checkpoint.config["text_config"], "model_type": model_type}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, info in checkpoint.tensors.items():
        if name.startswith("model.language_model."):
            start, end = end, end + info.num_bytes
            header[name.replace("language_model.", "")] = {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": [start, end],
            }
    raw = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return open_checkpoint(folder, headers_only=True)


@pytest.mark.parametrize(
    ("family", "model_type"),
    [
        ("31b", "gemma4_text"),
        ("26b-a4b", "gemma4_text"),
        ("12b", "gemma4_unified_text"),
    ],
)
def test_names_of_a_text_only_checkpoint(tmp_path, family, model_type):
    checkpoint = text_only(tmp_path / "text", family, model_type)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = mapped(checkpoint, shapes)
    assert found == sanitized(checkpoint, shapes)
    assert "model.embed_tokens.weight" in found


NO_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 1,
    "tie_word_embeddings": True,
}
LAYER = "model.language_model.layers.1"
MLX_LAYER = "language_model.model.layers.1"


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (
            "model.language_model.norm.weight",
            {
                "language_model.model.norm.weight": Share(
                    "model.language_model.norm.weight"
                )
            },
        ),
        (
            f"{LAYER}.experts.gate_up_proj",
            {
                f"{MLX_LAYER}.experts.switch_glu.gate_proj.weight": Share(
                    f"{LAYER}.experts.gate_up_proj", 0, 2
                ),
                f"{MLX_LAYER}.experts.switch_glu.up_proj.weight": Share(
                    f"{LAYER}.experts.gate_up_proj", 1, 2
                ),
            },
        ),
        (
            f"{LAYER}.experts.down_proj",
            {
                f"{MLX_LAYER}.experts.switch_glu.down_proj.weight": Share(
                    f"{LAYER}.experts.down_proj"
                )
            },
        ),
        (
            f"{LAYER}.mlp.down_proj.weight",
            {
                f"{MLX_LAYER}.mlp.down_proj.weight": Share(
                    f"{LAYER}.mlp.down_proj.weight"
                )
            },
        ),
        (
            f"{MLX_LAYER}.mlp.down_proj.scales",
            {
                f"{MLX_LAYER}.mlp.down_proj.scales": Share(
                    f"{MLX_LAYER}.mlp.down_proj.scales"
                )
            },
        ),
        ("model.vision_tower.norm.weight", {}),
        ("lm_head.weight", {}),
        ("model.language_model.layers.3.self_attn.k_proj.weight", {}),
    ],
)
def test_where_a_tensor_goes(tensor, expected):
    names = target_names([tensor], NO_SHARED, is_text_only=False)
    assert names.parameters == expected
    assert set(names.unused) == (set() if expected else {tensor})


def test_names_of_a_drafter_stay():
    tensors = ["model.norm.weight", "masked_embedding.token_ordering", "lm_head.weight"]
    names = drafter_names(tensors)
    assert names.parameters == {name: Share(name) for name in tensors[:2]}
    assert set(names.unused) == {"lm_head.weight"}


def test_messages_name_tensors_as_the_checkpoint_does():
    ours = "language_model.model.norm.weight"
    theirs = "model.language_model.norm.weight"
    assert tensor_name(ours, [theirs]) == theirs
    assert tensor_name(ours, [ours]) == ours


# Formats

ROUTER = "language_model.model.layers.0.router.proj"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (Format(4, 64), Format(8, 64)),
        (Format(4, 32), Format(8, 64)),
        (Format(2, 128), Format(8, 64)),
        (Format(8, 32), Format(8, 32)),
        (Format(8, 128), Format(8, 128)),
        (Format.of_mode("mxfp4"), Format(8, 64)),
        (Format.of_mode("nvfp4"), Format(8, 64)),
        (Format.of_mode("mxfp8"), Format(8, 64)),
    ],
)
def test_a_router_gets_eight_affine_bits(base, expected):
    assert Choice(TARGET, base).format_of(ROUTER, 2816) == expected
    assert (
        Choice(TARGET, base).format_of("model.layers.9.router.proj", 2816) == expected
    )


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
def test_centroids_are_never_packed(request_):
    choice = Choice(DRAFTER, request_.format)
    assert choice.format_of("masked_embedding.centroids", 256) is None


@pytest.mark.parametrize("path", ["pre_projection", "post_projection"])
@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (Format(4, 64), Format(8, 64)),
        (Format(8, 32), Format(8, 32)),
        (Format.of_mode("mxfp4"), Format(8, 64)),
    ],
)
def test_projections_get_eight_affine_bits(path, base, expected):
    assert Choice(DRAFTER, base).format_of(path, 1024) == expected


@pytest.mark.parametrize(
    ("part", "path"),
    [
        (DRAFTER, ROUTER),
        (TARGET, "masked_embedding.centroids"),
        (TARGET, "pre_projection"),
        (DRAFTER, "model.layers.0.pre_projection"),
        (TARGET, f"{ROUTER}.more"),
        (TARGET, Q_PROJ),
    ],
)
def test_rules_are_for_their_own_modules(part, path):
    assert Choice(part, Format(4, 64)).format_of(path, 128) == Format(4, 64)


@pytest.mark.parametrize("rule", quantize.RULES, ids=lambda rule: rule.what)
def test_rules_say_why(rule):
    assert rule.part in (TARGET, DRAFTER, None)
    assert rule.what
    assert rule.why


@pytest.mark.parametrize(
    ("base", "columns", "expected"),
    [
        (Format(4, 128), 704, Format(4, 64)),
        (Format(4, 64), 96, Format(4, 32)),
        (Format(4, 128), 96, Format(4, 32)),
        (Format(4, 32), 96, Format(4, 32)),
        (Format(4, 64), 8, None),
        (Format(4, 64), 16, None),
        (Format(3, 64), 2816, Format(3, 64)),
        (Format.of_mode("mxfp4"), 96, Format.of_mode("mxfp4")),
        (Format.of_mode("mxfp4"), 48, None),
        (Format.of_mode("nvfp4"), 48, None),
        (Format.of_mode("nvfp4"), 96, Format.of_mode("nvfp4")),
        (Format.of_mode("mxfp8"), 16, None),
    ],
)
def test_smaller_groups_where_rows_are_short(base, columns, expected):
    assert Choice(TARGET, base).format_of(Q_PROJ, columns) == expected


@given(st.sampled_from(list(REQUESTS.values())), st.integers(1, 10_000))
def test_what_is_chosen_fits(request_, columns):
    for part, path in ((TARGET, Q_PROJ), (TARGET, ROUTER), (DRAFTER, "pre_projection")):
        found = Choice(part, request_.format).format_of(path, columns)
        assert found is None or found.fits(columns)
        if request_.format is not None and columns % 32 == 0 and part == TARGET:
            assert found is not None
        if request_.format is None:
            assert found is None


# Files

arrays = st.lists(
    st.tuples(
        st.sampled_from(["BF16", "F32", "F16", "U32", "U8", "I32"]),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=20,
).map(
    lambda items: [
        Array(f"a{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(items)
    ]
)


@given(arrays, st.integers(0, 3000))
def test_files_are_valid(made, max_file_bytes):
    """Every array once; in a file no gap, no overlap, all places aligned."""
    files = safetensors.lay_out(made, max_file_bytes=max_file_bytes)
    assert sorted(name for file in files for name in file.arrays) == sorted(
        array.name for array in made
    )
    assert len({file.name for file in files}) == len(files)
    for file in files:
        length = int.from_bytes(file.header[:8], "little")
        assert len(file.header) == 8 + length
        assert len(file.header) % 8 == 0
        header = json.loads(file.header[8:])
        assert header.pop("__metadata__") == {"format": "mlx"}
        end = 0
        for name, entry in header.items():
            width = DTYPE_BITS[entry["dtype"]] // 8
            start, stop = entry["data_offsets"]
            assert start == end
            assert start % width == 0
            assert stop - start == math.prod(entry["shape"]) * width
            assert file.offsets[name] == len(file.header) + start
            end = stop
        assert file.num_bytes == len(file.header) + end
        num_arrays = sum(array.num_bytes > 0 for array in file.arrays.values())
        assert end <= max_file_bytes or num_arrays == 1
    contents = safetensors.index(files, num_weights=5)
    assert contents["metadata"]["total_parameters"] == 5
    assert contents["metadata"]["total_size"] == sum(a.num_bytes for a in made)
    for file in files:
        for name in file.arrays:
            assert contents["weight_map"][name] == file.name


def test_file_names_are_mlx_lms():
    made = [Array(f"a{i}", "U8", (10,)) for i in range(3)]
    one = safetensors.lay_out(made)
    assert [file.name for file in one] == ["model.safetensors"]
    three = safetensors.lay_out(made, max_file_bytes=10)
    expected = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in three] == expected


# Published checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The ten published checkpoints: headers with nothing behind them."""
    root = tmp_path_factory.mktemp("published")
    for repo in TARGETS:
        for name in (repo, f"{repo}-assistant"):
            write_headers(root / name, name)
    return root


def pair_of(folders, repo, request_, **changes):
    request = Request(
        folders / repo,
        folders / "out",
        draft_model=folders / f"{repo}-assistant",
        target=request_,
        drafter=request_,
        **changes,
    )
    return plan_conversion(request, headers_only=True)


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def shapes_of(model):
    return {name: array.shape for name, array in parameters(model).items()}


def check_accounts(plan, checkpoint):
    """Every tensor has one fate, and every byte of the headers is in the sums."""
    used = {parameter.tensor for parameter in plan.parameters}
    assert used | set(plan.unused) == set(checkpoint.tensors)
    assert not used & set(plan.unused)
    unused = (tensor_bytes(*checkpoint.tensors[name]) for name in plan.unused)
    assert plan.num_source_bytes + sum(unused) == checkpoint.num_bytes
    assert all(plan.unused.values())
    assert plan.num_bytes == sum(array.num_bytes for array in plan.arrays)
    assert sum(group.num_bytes for group in groups(plan)) == plan.num_bytes
    weights = {parameter.name: parameter.num_weights for parameter in plan.parameters}
    assert sum(weights.values()) == plan.num_weights


def check_tree(plan, model):
    """The arrays are those of the model that MLX quantizes alike."""
    float_shapes = shapes_of(model)
    assert [parameter.name for parameter in plan.parameters] == list(float_shapes)
    assert plan.num_weights == sum(math.prod(s) for s in float_shapes.values())

    def chosen(path, module):
        found = plan.formats.get(path)
        return False if found is None else found.as_config()

    nn.quantize(model, class_predicate=chosen)
    assert {array.name: array.shape for array in plan.arrays} == shapes_of(model)
    packed = {n for n, a in parameters(model).items() if a.dtype == mx.uint32}
    assert {array.name for array in plan.arrays if array.dtype == "U32"} == packed
    assert packed == {f"{path}.weight" for path in plan.formats}


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        # The one with the most kinds of tensors, and each of the others.
        *((TARGETS[3], name) for name in REQUESTS),
        *((repo, "default") for repo in TARGETS if repo != TARGETS[3]),
        (TARGETS[0], "float"),
        (TARGETS[0], "nvfp4"),
    ],
)
def test_published_pairs(folders, repo, name):
    gc.collect()  # what other tests left counts, too
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    conversion = pair_of(folders, repo, REQUESTS[name])
    assert mx.get_peak_memory() - before < 1 << 20  # nothing was made
    target, drafter = (part.plan for part in conversion.parts)
    check_accounts(target, published(repo))
    check_accounts(drafter, published(f"{repo}-assistant"))
    check_tree(target, target_skeleton(target.checkpoint))
    check_tree(drafter, drafter_skeleton(drafter.checkpoint))
    assert bool(target.formats) == (name != "float")


def test_rows_of_704_weights_are_packed(folders):
    """26B-A4B's experts: 5 GB would stay as they are."""
    target = pair_of(folders, TARGETS[3], PartRequest(format=Format(4, 128))).target
    sizes: dict[str, set[int]]
    sizes = {path.rpartition(".")[2]: set() for path in target.plan.formats}
    for path, packed in target.plan.formats.items():
        sizes[path.rpartition(".")[2]].add(packed.group_size)
    assert sizes["down_proj"] == {64}  # rows of 704 and of 2112
    assert sizes["up_proj"] == {128}
    kept = [p for p in target.plan.parameters if p.format is None]
    assert all(p.num_weights <= 5376 for p in kept)


@pytest.mark.parametrize("repo", TARGETS)
def test_published_types(folders, repo):
    conversion = pair_of(folders, repo, KEPT)
    for part in conversion.parts:
        dtypes = {array.name: array.dtype for array in part.plan.arrays}
        ordering = dtypes.pop("masked_embedding.token_ordering", "I32")
        assert ordering == "I32"  # I64 in the checkpoint
        assert set(dtypes.values()) == {"BF16"}


@pytest.mark.parametrize("repo", TARGETS[:2])
def test_published_targets_saved_again(tmp_path, folders, repo):
    """Without the K/V that nothing uses the plan is the same."""
    checkpoint = without_shared_kv(published(repo))
    folder = write_headers(tmp_path / "target", checkpoint)
    opened = open_checkpoint(folder, headers_only=True)
    plan = plan_target(opened, Format(4, 64), dtype=None)
    check_accounts(plan, checkpoint)
    full = open_checkpoint(folders / repo, headers_only=True)
    expected = plan_target(full, Format(4, 64), dtype=None)
    assert list(plan.arrays) == list(expected.arrays)
    assert plan.formats == expected.formats
    assert plan.config == expected.config
    reasons = {reason for name, reason in expected.unused.items() if ".layers." in name}
    assert any("other layers' K/V" in reason for reason in reasons)


@pytest.mark.parametrize("repo", TARGETS)
def test_dry_run_of_published_pairs(folders, repo, capsys):
    drafter = f"{folders / repo}-assistant"
    argv = ["--hf-path", str(folders / repo), "--draft-model", drafter, "--dry-run"]
    before = sorted(folders.rglob("*"))
    for flags in ([], ["--q-mode", "mxfp4"], ["--no-quantize", "--dtype", "float16"]):
        assert main([*argv, *flags]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name in (repo, f"{repo}-assistant"):
            num_tensors = len(published(name).tensors)
            assert f"all {num_tensors} tensors" in out
    assert sorted(folders.rglob("*")) == before  # nothing was written


def test_dry_run_finds_the_drafter_beside_the_target(folders, capsys):
    argv = ["--hf-path", str(folders / TARGETS[0]), "--dry-run"]
    assert main(argv) == 0
    assert "found beside the target" in capsys.readouterr().out


@pytest.mark.parametrize("repo", TARGETS)
def test_headers_alone_cannot_be_converted(folders, repo, tmp_path, capsys):
    place = tmp_path / "out"
    argv = ["--hf-path", str(folders / repo), "--mlx-path", str(place)]
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "so it is cut off" in line
    assert not any(tmp_path.iterdir())


def test_a_drafter_of_another_size_is_refused(folders, capsys):
    drafter = str(folders / f"{TARGETS[4]}-assistant")
    argv = ["--hf-path", str(folders / TARGETS[0]), "--draft-model", drafter]
    assert main([*argv, "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert " must " in line


# Tensors that do not fit


def changed(folder, repo, change):
    """A published checkpoint with other tensors: headers only."""
    checkpoint = published(repo)
    change(checkpoint.tensors)
    return open_checkpoint(write_headers(folder, checkpoint), headers_only=True)


NORM = "model.language_model.norm.weight"
ORDERING = "masked_embedding.token_ordering"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "no such tensor"]),
        (lambda t: t.update({NORM: ("BF16", (3,))}), [NORM, "[1536]", "[3]"]),
        (lambda t: t.update({NORM: ("I64", (1536,))}), [NORM, "I64", "float"]),
        (
            lambda t: t.update({"model.language_model.extra": ("BF16", (3,))}),
            ["model.language_model.extra", "does not have"],
        ),
    ],
)
def test_targets_of_another_make(tmp_path, change, words):
    checkpoint = changed(tmp_path / "target", TARGETS[0], change)
    with pytest.raises(CheckpointError) as caught:
        plan_target(checkpoint, Format(4, 64), dtype=None)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(ORDERING), [ORDERING, "no such tensor"]),
        (lambda t: t.update({ORDERING: ("BF16", (262144,))}), [ORDERING, "I64"]),
        (lambda t: t.update({ORDERING: ("I64", (8,))}), [ORDERING, "[262144]", "[8]"]),
    ],
)
def test_drafters_of_another_make(tmp_path, change, words):
    checkpoint = changed(tmp_path / "drafter", f"{TARGETS[0]}-assistant", change)
    with pytest.raises(CheckpointError) as caught:
        plan_drafter(checkpoint, Format(4, 64), dtype=None)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--q-bits", "7"], ["bits", "got 7"]),
        (["--draft-q-mode", "nvfp4", "--draft-q-bits", "8"], ["bits", "got 8"]),
        (["--q-mode", "mxfp4", "--q-group-size", "64"], ["group size", "got 64"]),
        (["--no-quantize", "--q-bits", "4"], ["--no-quantize", "--q-"]),
        (["--no-draft-quantize", "--draft-q-bits", "4"], ["--no-draft-quantize"]),
        (["--q-mode", "int4"], ["int4"]),
        (["--dtype", "float64"], ["float64"]),
        (["--q-bits", "four"], ["four"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_flags_that_do_not_go_together(folders, flags, words, capsys):
    argv = ["--hf-path", str(folders / TARGETS[0]), "--dry-run", *flags]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_wrong_format_is_a_request_error():
    with pytest.raises(RequestError):
        Format.of_mode("affine", bits=9)
