"""Transformer-XL equals the paper's segment loop and XLNet's attention, and learns from a detached memory."""

import pytest
import torch
from reference.transformer_xl import segments, sliding

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.segments import Segments
from writehead.core.slots import Store
from writehead.core.state import detach, nbytes
from writehead.mixers.transformer_xl import TransformerXL
from writehead.model.decoder import Decoder
from writehead.positions import relative

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def weights_of(mixer):
    """As the reference takes them."""
    H, G, D = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, D)).split([H, G, G])
    r = mixer.relative.weight.unflatten(0, (-1, D))
    u, w = mixer.content_bias, mixer.place_bias
    return {"q": q, "k": k, "v": v, "r": r, "u": u, "w": w, "out": mixer.out.weight}


def large(mixer):
    """The same in float64, its small biases made to matter."""
    with torch.no_grad():
        mixer.content_bias.normal_()
        mixer.place_bias.normal_()
    return mixer.double()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("segment", "memory", "clamp"), [(4, 6, None), (3, 0, None), (5, 2, 3), (20, 4, None)]
)
def test_any_segment_and_memory_is_the_papers_loop_with_its_gradients(kv_heads, segment, memory, clamp):
    mixer = large(TransformerXL(8, heads=4, kv_heads=kv_heads, segment=segment, memory=memory, clamp=clamp))
    x = torch.randn(2, 11, 8).double().requires_grad_()
    right = torch.stack([segments(row, weights_of(mixer), segment, memory, clamp) for row in x])
    y, _, aux = mixer(x, Positions.range(2, 0, 11))
    torch.testing.assert_close(y, right, **EXACT)
    assert aux == {}
    weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_sliding_form_reads_the_last_keys_the_querys_own_among_them():
    mixer = large(TransformerXL(8, heads=2, segment=None, memory=4))
    x = torch.randn(1, 9, 8).double()
    right = sliding(x[0], weights_of(mixer), 4)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, Positions.range(1, 0, 9))[0][0], right, **EXACT)


def test_memory_after_a_detach_holds_hidden_states_from_which_the_projections_still_learn():
    mixer = large(TransformerXL(8, heads=2, segment=4, memory=4))
    x = torch.randn(1, 8, 8).double()
    first, second = x[:, :4].clone().requires_grad_(), x[:, 4:]
    _, state, _ = mixer(first, Positions.range(1, 0, 4))
    y, _, _ = mixer(second, Positions.range(1, 4, 8), detach(state))
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), (mixer.qkv.weight, first), allow_unused=True)
    assert ours[1] is None
    # the paper's: memory tokens are constants that enter as hidden states
    right = segments(torch.cat([x[0, :4].detach(), x[0, 4:]]), weights_of(mixer), 4, 4)[4:]
    (theirs,) = torch.autograd.grad((right * weight[0]).sum(), mixer.qkv.weight)
    torch.testing.assert_close(ours[0], theirs, **EXACT)


def test_a_memory_of_hidden_states_becomes_keys_and_values_where_no_gradient_is_wanted():
    mixer = large(TransformerXL(8, heads=4, kv_heads=1, segment=4, memory=6))
    x, pos = torch.randn(2, 9, 8).double(), Positions.range(2, 0, 9)
    later, after = torch.randn(2, 3, 8).double(), Positions.range(2, 9, 12)
    _, hidden, _ = mixer(x, pos)
    with torch.no_grad():
        _, plain, _ = mixer(x, pos)
        y, turned, _ = mixer(later, after, hidden)
        right, plain, _ = mixer(later, after, plain)
    torch.testing.assert_close(y, right, **EXACT)
    assert nbytes(turned) == nbytes(plain) == mixer.state_bytes(2, 12, 8)


def test_segments_begin_at_absolute_positions_whatever_the_calls():
    mixer = large(TransformerXL(8, heads=2, segment=4, memory=0))
    x = torch.randn(1, 10, 8).double()
    with torch.no_grad():
        whole = mixer(x, Positions.range(1, 0, 10))[0]
        state, pieces = None, []
        for a, b in ((0, 3), (3, 5), (5, 10)):
            y, state, _ = mixer(x[:, a:b], Positions.range(1, a, b), state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
        moved = x.clone()
        moved[:, 3] += 1
        changed = (mixer(moved, Positions.range(1, 0, 10))[0] - whole).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t == 3 for t in range(10)]


def test_both_ways_to_score_distances_agree(monkeypatch):
    map_ = relative.Relative(8, 2, 3, clamp=5).double()
    q, distance = torch.randn(2, 4, 6, 3).double(), torch.arange(-2, 8).expand(2, 4, -1)
    pos, found = Positions.range(2, 0, 4), []
    for way in (True, False):
        monkeypatch.setattr(relative, "by_query", lambda *_, way=way: way)
        found.append(map_(q, distance, pos))
    torch.testing.assert_close(*found, **EXACT)
    assert torch.equal(found[0][..., -1], found[0][..., -3])  # 7 and 5 count as 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_memory_may_be_kept_in_fewer_bits(dtype):
    mixer = TransformerXL(8, heads=2, segment=4, memory=6)
    x = torch.randn(2, 9, 8)
    state = mixer.init_state(2, x, Store(dtype=dtype))
    with torch.no_grad():
        y, state, _ = mixer(x, Positions.range(2, 0, 9), state)
        right = mixer(x, Positions.range(2, 0, 9))[0]
    assert nbytes(state) == mixer.state_bytes(2, 9, 4, Store(dtype=dtype))
    assert 1e-6 < float((y - right).abs().max()) < 0.1


def test_xlnets_attention_gives_the_same_with_copied_weights():
    modeling = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    transformers = pytest.importorskip("transformers")
    T, M, X, H, D = 5, 4, 8, 2, 4
    config = transformers.XLNetConfig(d_model=X, n_head=H, d_inner=8, n_layer=1, dropout=0.0)
    theirs = modeling.XLNetRelativeAttention(config).double().eval()
    mixer = large(TransformerXL(X, heads=H, segment=T, memory=M))
    w = weights_of(mixer)
    with torch.no_grad():
        for name, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("r", "r")):
            getattr(theirs, name).copy_(w[ours].permute(2, 0, 1))
        theirs.o.copy_(w["out"].unflatten(1, (H, D)))
        theirs.r_w_bias.copy_(w["u"])
        theirs.r_r_bias.copy_(w["w"])
        memory, x = torch.randn(1, T, X).double(), torch.randn(1, T, X).double()
        _, state, _ = mixer(memory, Positions.range(1, 0, T))
        ours = mixer(x, Positions.range(1, T, 2 * T), state)[0]
        waves = relative.wave(T + M + 1, X, x.dtype, x.device).flip(0)[:, None]
        hidden = torch.ones(T, M + T, dtype=torch.bool).triu(M + 1)[:, :, None, None].double()
        h, mems = x.transpose(0, 1), memory[:, -M:].transpose(0, 1)
        out = theirs(h, None, hidden, None, waves, None, mems=mems)[0].transpose(0, 1)
    # theirs adds the residual and normalises
    right = torch.nn.functional.layer_norm(ours + x, (X,), eps=config.layer_norm_eps)
    torch.testing.assert_close(right, out, rtol=1e-9, atol=1e-10)


def test_a_longer_memory_than_in_training_needs_no_other_weights():
    def model(memory):
        spec = {"name": "transformer_xl", "heads": 2, "segment": 4, "memory": memory}
        return Decoder(ModelConfig(vocab=7, dim=8, depth=2, mixer=spec, position={"name": "none"}))

    short, long = model(4), model(9)
    long.load_state_dict(short.state_dict())
    tokens = torch.randint(0, 7, (1, 12))
    with torch.no_grad():
        a, b = short(tokens)[0][0], long(tokens)[0][0]
    assert torch.allclose(a[:8], b[:8], atol=1e-5)
    assert not torch.allclose(a[8:], b[8:], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TransformerXL(8, segment=0),
            r"Segments\(segment=0, memory=128\): segment must be at least 1, memory at least 0; nearest is "
            r"Segments\(1, 128\)",
        ),
        (lambda: TransformerXL(8, segment=None, memory=0), r"Window\(window=0, after=0\)"),
        (lambda: TransformerXL(8, clamp=0), "clamp=0 must be at least 1, or nothing"),
        (lambda: TransformerXL(9, heads=3), "dim=9 must be a positive multiple of two=2; nearest is 8"),
        (
            lambda: TransformerXL(8)(torch.randn(1, 3, 8), Positions.range(1, 0, 2)),
            r"x must have shape \(B=1, T=2, X=8\); got \(1, 3, 8\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_keys_of_segments_are_those_allowed():
    pattern = Segments(4, 3)
    q = torch.arange(15)
    listed = [{int(k) for k in row if k >= 0} for row in pattern.keys(q)]
    allowed = pattern.allows(q[:, None], q[None, :])
    assert listed == [set(row.nonzero()[:, 0].tolist()) for row in allowed]
    assert listed[9] == {5, 6, 7, 8, 9}
