"""Formats: what MLX has, the shapes they give, and formats told from shapes.

Run: python -m pytest tests/checkpoints/test_quantization.py
"""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.checkpoints.quantization import MODES, Format, stored_format
from mlx_gemma_mtp.errors import RequestError

FORMATS = [
    Format(bits, group_size, mode)
    for mode, (all_bits, group_sizes) in MODES.items()
    for bits in all_bits
    for group_size in group_sizes
]
formats = st.sampled_from(FORMATS)
counts = st.integers(0, 4096)


def ids(value):
    return value.name if isinstance(value, Format) else None


def fails(call, *words):
    with pytest.raises(RequestError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert " must be " in message
    for word in words:
        assert str(word) in message


# What MLX has


@pytest.mark.parametrize("packed", FORMATS, ids=ids)
def test_mlx_packs_every_format_into_these_shapes(packed):
    shape = (3, 4, 256)
    made = mx.quantize(mx.ones(shape), **packed.as_config())
    weight, scales, *biases = made
    assert weight.shape == packed.packed_shape(shape)
    assert weight.dtype == mx.uint32
    assert scales.shape == packed.scales_shape(shape)
    assert bool(biases) == packed.has_biases
    assert (scales.dtype == mx.uint8) == (not packed.has_biases)
    for bias in biases:
        assert bias.shape == packed.scales_shape(shape)


@pytest.mark.parametrize("mode", MODES)
def test_mlx_has_no_other_format(mode):
    """The table is complete from 2 bits on: what it does not list, MLX refuses, too."""
    listed = {(f.bits, f.group_size) for f in FORMATS if f.mode == mode}
    for bits in range(2, 9):
        for group_size in (8, 16, 32, 64, 128, 256):
            if (bits, group_size) in listed:
                continue
            with pytest.raises(ValueError, match=r"\[quantize\]"):
                mx.eval(mx.quantize(mx.ones((2, 512)), group_size, bits, mode))


@pytest.mark.parametrize("mode", MODES)
def test_defaults_are_those_of_mlx(mode):
    """MLX takes these where neither bits nor group size is named."""
    columns = 256
    weight, scales, *_ = mx.quantize(mx.ones((2, columns)), mode=mode)
    default = Format.of_mode(mode)
    assert weight.shape == default.packed_shape((2, columns))
    assert scales.shape == default.scales_shape((2, columns))


# Formats that are asked for


@pytest.mark.parametrize("packed", FORMATS, ids=ids)
def test_every_format_can_be_asked_for(packed):
    config = packed.as_config()
    assert Format.of_mode(config.pop("mode"), **config) == packed
    assert str(packed.bits) in packed.name
    assert packed.mode in packed.name


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("affine", {"bits": 7}, ["bits", "2, 3, 4, 5, 6 or 8", "got 7"]),
        ("affine", {"bits": 0}, ["bits", "got 0"]),
        ("affine", {"bits": -4}, ["bits", "got -4"]),
        ("affine", {"group_size": 16}, ["group size", "32, 64 or 128", "got 16"]),
        ("mxfp4", {"bits": 8}, ["bits", "mxfp4", "4", "got 8"]),
        ("mxfp4", {"group_size": 64}, ["group size", "32", "got 64"]),
        ("nvfp4", {"group_size": 32}, ["group size", "16", "got 32"]),
        ("nvfp4", {"bits": 8}, ["bits", "got 8"]),
        ("mxfp8", {"bits": 4}, ["bits", "8", "got 4"]),
        ("mxfp8", {"group_size": 64}, ["group size", "32", "got 64"]),
        ("int4", {}, ["mode", "affine, mxfp4, nvfp4, mxfp8", "'int4'"]),
    ],
)
def test_what_mlx_does_not_have_is_refused(mode, settings, words):
    fails(lambda: Format.of_mode(mode, **settings), *words)


@given(
    st.sampled_from([*MODES, "", "AFFINE", "q4_0"]),
    st.none() | st.integers(-10, 300),
    st.none() | st.integers(-10, 300),
)
def test_a_format_is_one_of_the_table_or_one_line(mode, bits, group_size):
    try:
        made = Format.of_mode(mode, bits=bits, group_size=group_size)
    except RequestError:
        fails(lambda: Format.of_mode(mode, bits=bits, group_size=group_size))
    else:
        assert made in FORMATS
        assert bits is None or made.bits == bits
        assert group_size is None or made.group_size == group_size


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [
        (64, 64, True),
        (64, 96, False),
        (32, 96, True),
        (64, 0, False),
        (128, 704, False),
    ],
)
def test_rows_are_whole_groups(group_size, columns, expected):
    assert Format(4, group_size).fits(columns) is expected


# Formats that are found


@given(formats, st.integers(1, 200))
def test_the_shapes_tell_the_format(packed, num_groups):
    columns = packed.group_size * num_groups
    found = stored_format(
        columns,
        num_words=packed.packed_shape((columns,))[0],
        num_scales=packed.scales_shape((columns,))[0],
        has_byte_scales=not packed.has_biases,
    )
    assert found == packed


@given(formats, st.integers(1, 200))
def test_mlx_lm_reads_the_same_from_the_shapes(packed, num_groups):
    if "infer_quant_config" not in vars(mlx_lm.utils):
        pytest.skip("this mlx-lm takes bits from the map only")
    columns = packed.group_size * num_groups
    scales_dtype: type = np.float32 if packed.has_biases else np.uint8
    weights = {
        "m.weight": mx.zeros(packed.packed_shape((1, columns)), mx.uint32),
        "m.scales": mx.array(np.zeros(packed.scales_shape((1, columns)), scales_dtype)),
    }
    module = SimpleNamespace(weight=np.empty((1, columns)))
    found = mlx_lm.utils.infer_quant_config("m", module, weights)  # type: ignore[arg-type]
    assert found == packed.as_config()


@given(counts, counts, counts, st.booleans())
def test_other_shapes_are_no_format(columns, num_words, num_scales, has_byte_scales):
    """Whatever is found gives back exactly the shapes it was found from."""
    found = stored_format(
        columns,
        num_words=num_words,
        num_scales=num_scales,
        has_byte_scales=has_byte_scales,
    )
    if found is None:
        return
    assert found in FORMATS
    assert found.packed_shape((columns,)) == (num_words,)
    assert found.scales_shape((columns,)) == (num_scales,)
    assert found.has_biases != has_byte_scales


@pytest.mark.parametrize(
    ("columns", "num_words", "num_scales", "has_byte_scales"),
    [
        (64, 8, 1, True),  # bytes for scales, groups of no such mode
        (64, 8, 4, False),  # affine in groups of 16
        (64, 14, 1, False),  # 7 bits
        (64, 9, 1, False),  # no whole bits
        (64, 0, 1, False),
        (64, 8, 0, False),
        (64, 8, 3, False),  # no whole groups
        (0, 8, 1, False),
        (64, 16, 4, True),  # 8 bits in groups of 16
    ],
)
def test_shapes_of_no_format(columns, num_words, num_scales, has_byte_scales):
    found = stored_format(
        columns,
        num_words=num_words,
        num_scales=num_scales,
        has_byte_scales=has_byte_scales,
    )
    assert found is None
