"""Packed formats: what is packed comes back, within half a step of its group, and lies where the kernels look."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.config import ModelConfig
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.parts import weights
from writehead.native.formats import pack, unpack
from writehead.native.structs import FORMATS, GROUP, shapes
from writehead.native.weights import pack_model, pack_weights, unpack_weights

SHAPES = [(1, 1), (16, 32), (17, 33), (49, 100), (100, 31), (3, 64)]


def half_steps(weight: torch.Tensor, format: str) -> torch.Tensor:
    """Half a step of each weight's group, from the definition: a 127th of the largest, a 15th of the range."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP), mode="replicate").double()
    groups = groups.unflatten(1, (-1, GROUP))
    steps = {"int8": groups.abs().amax(-1) / 127, "int4": (groups.amax(-1) - groups.amin(-1)) / 15}
    return (steps[format] / 2).repeat_interleave(GROUP, 1)[:, : weight.shape[1]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_packed_comes_back(format, shape):
    weight = torch.randn(shape)
    matrix = pack(weight, format)
    back = unpack(matrix, torch.float64)
    if format in ("int8", "int4"):
        rounding = 2.0**-11 * (weight.abs().max() + 16 * half_steps(weight, format).max())
        assert ((back - weight).abs() <= half_steps(weight, format) + rounding).all()
    else:
        assert torch.equal(back, weight.to(getattr(torch, format)).double())
    assert (matrix.n, matrix.k, matrix.format) == (*shape, format)
    assert torch.equal(unpack(matrix), back.float())


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_a_format_has_are_kept_exactly(format):
    whole = torch.randint(0, 16, (20, 70)).float()
    whole[:, ::32], whole[:, 1::32] = 0, 15  # the range of a group
    weight = whole * 0.25 - 2 if format == "int4" else (whole - 8) * 8
    if format == "int8":
        weight[:, ::32] = 127
    assert torch.equal(unpack(pack(weight, format)), weight)


def test_each_number_lies_where_the_layout_says():
    n, k = 37, 100
    weight = torch.randn(n, k)
    floats, eight, four = (pack(weight, f) for f in ("float32", "int8", "int4"))
    back8, back4 = unpack(eight, torch.float64), unpack(four, torch.float64)
    for o, i in [(0, 0), (15, 3), (16, 4), (36, 99), (20, 31), (21, 32), (22, 47), (23, 48), (1, 63)]:
        assert floats.data[o // 16, i, o % 16] == weight[o, i]
        u = int(eight.data[o // 16, i // 4, o % 16, i % 4])
        assert (u - 128) * float(eight.scales[o // 16, i // 32, o % 16]) == back8[o, i]
        g, b = i // 32, i % 16
        byte = int(four.data[o // 16, g, b // 4, o % 16, b % 4])
        q = byte >> 4 if i % 32 >= 16 else byte & 15
        scale, least = (float(four.scales[o // 16, g, part, o % 16]) for part in (0, 1))
        assert q * scale + least == back4[o, i]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_is_zero_and_shapes_are_as_stated(format, shape):
    matrix = pack(torch.randn(shape), format)
    data, scales = shapes(format, *shape)
    assert matrix.data.shape == data
    assert (None if matrix.scales is None else matrix.scales.shape) == scales
    if matrix.scales is None:
        dense = matrix.data.transpose(1, 2).flatten(0, 1).float()
        assert not dense[shape[0] :].any()
        assert not dense[:, shape[1] :].any()
    elif format == "int8":
        values = matrix.data.transpose(1, 2).reshape(matrix.data.shape[0] * 16, -1)
        assert (values[:, shape[1] :] == 128)[: shape[0]].all()
        assert not matrix.scales.transpose(1, 2).flatten(0, 1)[shape[0] :].any()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-3, 2e-4])
def test_scales_too_small_for_full_precision_still_reach_over_their_group(format, size):
    weight = torch.randn(64, 256) * size / 4
    weight[:, :32] = torch.linspace(0, size, 32)
    matrix = pack(weight, format)
    assert matrix.format == format
    step = 2.0**-24  # of the scale, which is rounded by half of it, or up by one of it
    steps = 127 if format == "int8" else 15
    error = (unpack(matrix, torch.float64) - weight).abs()
    assert (error <= half_steps(weight, format) + step * (steps / 2 + 1)).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e9, 1e-6, 1e-30])
def test_a_matrix_that_half_precision_scales_cannot_serve_stays_in_bfloat16(format, size):
    weight = torch.randn(20, 40) * size
    matrix = pack(weight, format)
    assert matrix.format == "bfloat16"
    assert torch.equal(unpack(matrix), weight.bfloat16().float())


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_tiny_rows_among_others_and_rows_of_zeros_are_quantised(format):
    weight = torch.randn(40, 64)
    weight[3], weight[7] = 0, 1e-30
    weight[9] = torch.randn(64) * 60000 / 5
    matrix = pack(weight, format)
    assert matrix.format == format
    back = unpack(matrix)
    assert not back[3].any()
    assert back[7].abs().max() < 1e-6
    assert back.isfinite().all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(format, bad):
    weight = torch.randn(20, 40)
    weight[13, 39] = bad
    with pytest.raises(ValueError, match="not finite cannot be quantised"):
        pack(weight, format)


@pytest.mark.parametrize(
    ("weight", "format", "message"),
    [
        (torch.ones(2, 3), "int5", "did you mean|accepted"),
        (torch.ones(6), "int8", r"shape \(6,\) cannot be packed"),
        (torch.ones(0, 3), "float32", r"shape \(0, 3\) cannot be packed"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, format, message):
    with pytest.raises(ValueError, match=message):
        pack(weight, format)


@given(n=st.integers(1, 40), k=st.integers(1, 80), seed=st.integers(0, 99), format=st.sampled_from(FORMATS))
def test_packing_what_was_unpacked_changes_nothing_more(n, k, seed, format):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    once = unpack(pack(weight, format))
    twice = unpack(pack(once, format))
    assert torch.allclose(once, twice, rtol=0, atol=float(once.abs().max()) * 2.0**-10)


def config(**values):
    given = {
        "vocab": 50,
        "dim": 24,
        "depth": 2,
        "mixer": {"name": "gqa", "heads": 4, "kv_heads": 2, "bias": "all"},
    }
    feedforward = {"name": "dense", "hidden": 20, "gated": True, "bias": True}
    return ModelConfig(**(given | {"feedforward": feedforward} | values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_embeddings": False, "head_bias": True},
        {"feedforward": {"name": "chunked", "hidden": 40, "gated": True}},
        {"feedforward": {"name": "dense"}},
    ],
)
def test_a_models_weights_come_back_from_its_packed_form(values):
    model = Decoder(config(**values))
    ours = weights(model)
    for parameter in model.parameters():
        parameter.data.normal_()
    packed = pack_model(model, "float32")
    back = unpack_weights(packed)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert packed.nbytes > sum(weight.nbytes for weight in ours.values())  # padding
    assert all(vector.dim() == 1 for vector in packed.vectors.values())


def test_gate_and_input_rows_take_turns_of_sixteen():
    model = Decoder(config())
    inner = model.stack.blocks[1].feedforward.inner
    packed = pack_model(model, "float32")
    rows = unpack(packed.matrices["stack.blocks.1.feedforward.inner.weight"])
    bias = packed.vectors["stack.blocks.1.feedforward.inner.bias"]
    assert len(rows) == len(bias) == 64
    for place, row in [(0, 0), (15, 15), (16, 20), (31, 35), (32, 16), (35, 19), (48, 36), (51, 39)]:
        assert torch.equal(rows[place], inner.weight[row])
        assert bias[place] == inner.bias[row]
    assert not rows[36:48].any()
    assert not rows[52:].any()


def test_an_int4_model_has_its_tables_in_int8():
    packed = pack_model(Decoder(config(tie_embeddings=False)), "int4")
    tables = {"embedding.table", "embedding.output"}
    assert {name for name, m in packed.matrices.items() if m.format == "int8"} == tables
    assert {m.format for name, m in packed.matrices.items() if name not in tables} == {"int4"}


def test_packed_vectors_are_no_views_of_the_model():
    model = Decoder(config())
    packed = pack_model(model, "float32")
    before = packed.vectors["stack.blocks.0.mixer_norm.weight"].clone()
    with torch.no_grad():
        model.stack.blocks[0].mixer_norm.weight += 1
    assert torch.equal(packed.vectors["stack.blocks.0.mixer_norm.weight"], before)


def test_models_that_do_not_decode_are_not_packed():
    encoder = Encoder(
        config(kind="encoder", mixer={"name": "bidirectional", "heads": 4}, position={"name": "sinusoidal"})
    )
    with pytest.raises(ValueError, match="Encoder cannot be packed"):
        pack_model(encoder, "int8")
    with pytest.raises(ValueError, match="kind 'encoder' cannot be packed"):
        pack_weights(encoder.config, weights(encoder).items(), "int8")
