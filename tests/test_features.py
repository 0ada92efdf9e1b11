"""Feature maps: products estimate their kernels without bias, orthogonal draws beat independent ones, draws are
saved and replaced only when asked."""

import math

import pytest
import torch
from reference.performer import positive, rectified
from reference.rfa import features

from writehead.config import ModelConfig
from writehead.convert.load import load, save
from writehead.core.positions import Positions
from writehead.mixers.performer import Performer
from writehead.model.decoder import Decoder
from writehead.ops.features import Positive, Relu, Unit, directions, redraw


@pytest.mark.parametrize("draw", ["orthogonal", "regularised"])
def test_directions_of_a_block_are_orthogonal(draw):
    W = directions(10, 4, draw, torch.Generator().manual_seed(1))
    lengths = W.norm(dim=1)
    for block in (W[:4], W[4:8], W[8:]):
        unit = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)).double(), rtol=0, atol=1e-12)
    assert torch.allclose(lengths, torch.tensor(2.0).double()) == (draw == "regularised")


@pytest.mark.parametrize("draw", ["independent", "orthogonal", "regularised"])
def test_directions_point_everywhere_alike_also_along_the_diagonal(draw):
    """Rotations whose signs are not set, as in the released codes, have negative first entries throughout."""
    W = directions(4000, 16, draw, torch.Generator().manual_seed(2))
    error = 1 / math.sqrt(len(W))
    for along in (torch.ones(16).double() / 4, torch.eye(16).double()[0], torch.eye(16).double()[15]):
        assert abs(float((W @ along).mean())) < 4 * error
        assert abs(float((W @ along).square().mean()) - 1) < 4 * math.sqrt(2) * error
    firsts = W.unflatten(0, (-1, 16))[:, :, 0]
    assert abs(float((firsts < 0).double().mean()) - 0.5) < 2 * error


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("draw", ["independent", "orthogonal"])
def test_products_of_positive_features_are_the_exponential_on_average(draw, hyperbolic):
    made = Positive(1, 1, 8, 20000, draw, 1.0, hyperbolic).double()
    qk = torch.randn(1, 1, 2, 8).double()
    qk = 0.5 * qk / qk.norm(dim=-1, keepdim=True)
    q, k = positive_features(qk[0, 0], made.directions[0], 1.0, hyperbolic)
    right = torch.exp(qk[0, 0, 0] @ qk[0, 0, 1])
    error = float((q * k).std()) * math.sqrt(len(q))
    assert error / float(right) < 0.02
    assert abs(float(q @ k - right)) < 4 * error


def positive_features(x, W, scale, hyperbolic=False):
    """The reference's features, all at once."""
    x = x * math.sqrt(scale)
    p = torch.cat([x @ W.T, -x @ W.T], -1) if hyperbolic else x @ W.T
    return torch.exp(p - (x * x).sum(-1, keepdim=True) / 2) / math.sqrt(p.shape[-1])


@pytest.mark.parametrize("hyperbolic", [False, True])
def test_the_map_gives_the_papers_features_but_for_factors_that_cancel(hyperbolic):
    made = Positive(2, 1, 4, 6, hyperbolic=hyperbolic).double()
    qk = torch.randn(2, 5, 3, 4).double()
    q, k, gain = made(qk)
    right = positive(qk, made.directions[0], 0.5, hyperbolic)
    assert q.shape[-1] == k.shape[-1] == made.width == right.shape[-1]
    ratio = q / right[:, :, :2]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-10, atol=0)
    ours = k * gain.exp()[..., None]
    torch.testing.assert_close(ours, right[:, :, 2:] * math.sqrt(made.width), rtol=1e-10, atol=1e-12)
    assert float(q.max()) == float(k.max()) == 1


def test_rectified_features_with_and_without_directions():
    qk = torch.randn(1, 5, 3, 4).double()
    made = Relu(2, 1, 4, 6).double()
    q, k, gain = made(qk)
    torch.testing.assert_close(
        torch.cat([q, k], 2), rectified(qk, made.directions[0], 0.5), rtol=1e-12, atol=1e-12
    )
    assert gain is None
    bare = Relu(2, 1, 4, None, scale=1.0).double()
    q, k, _ = bare(qk)
    torch.testing.assert_close(torch.cat([q, k], 2), rectified(qk, None, 1.0), rtol=1e-12, atol=1e-12)
    assert (bare.width, bare.products, bare.held) == (4, 0, 0)


@pytest.mark.parametrize("kernel", ["gaussian", "arccos"])
def test_unit_features_use_the_directions_and_the_scale_of_their_key_head(kernel):
    made = Unit(4, 2, 3, 5, "independent", kernel).double()
    with torch.no_grad():
        made.sigma += 0.5 * torch.rand_like(made.sigma)
    qk = torch.randn(2, 3, 6, 3).double()
    q, k, _ = made(qk)
    for head in range(4):
        W, sigma = made.directions[head // 2], made.sigma[head // 2, 0]
        torch.testing.assert_close(
            q[:, :, head], features(qk[:, :, head], W, sigma, kernel), rtol=1e-11, atol=1e-12
        )
    for head in range(2):
        W, sigma = made.directions[head], made.sigma[head, 0]
        torch.testing.assert_close(
            k[:, :, head], features(qk[:, :, 4 + head], W, sigma, kernel), rtol=1e-11, atol=1e-12
        )


def test_gaussian_unit_features_estimate_the_gaussian_of_the_distance():
    made = Unit(1, 1, 4, 50000, "independent", "gaussian").double()
    qk = torch.randn(1, 6, 2, 4).double()
    q, k, _ = made(qk)
    unit = qk / qk.norm(dim=-1, keepdim=True)
    right = torch.exp(-(unit[0, :, 0, None] - unit[0, None, :, 1]).square().sum(-1) / 2)
    torch.testing.assert_close(q[0, :, 0] @ k[0, :, 0].T, right, rtol=0, atol=0.02)


def attention_error(count, draw, seed):
    """Mean square error of attention with `count` directions against softmax attention."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 32, 8, generator=generator, dtype=torch.float64).unbind()
    right = torch.softmax(q @ k.T * 8**-0.5 / 4, -1) @ v
    W = directions(count, 8, draw, generator)
    weights = positive_features(q, W, 8**-0.5 / 4) @ positive_features(k, W, 8**-0.5 / 4).T
    return float((weights / weights.sum(-1, keepdim=True) @ v - right).square().mean())


def test_the_error_against_softmax_falls_with_features_and_orthogonal_draws_are_better():
    """The variance falls as 1 / R; orthogonal directions lessen it (Choromanski et al. 2020, theorem 2)."""
    errors = {
        (draw, R): sum(attention_error(R, draw, seed) for seed in range(40)) / 40
        for draw in ("independent", "orthogonal")
        for R in (32, 128, 512)
    }
    for draw in ("independent", "orthogonal"):
        slope = math.log(errors[draw, 512] / errors[draw, 32]) / math.log(16)
        assert -1.15 < slope < -0.85
    for R in (32, 128, 512):
        assert errors["orthogonal", R] < errors["independent", R]


def decoder(name):
    spec = {"name": name, "heads": 2, "features": 8}
    return Decoder(
        ModelConfig(vocab=11, dim=8, depth=2, mixer=spec, feedforward={"name": "dense", "hidden": 8})
    )


@pytest.mark.parametrize("name", ["performer", "performer_relu", "rfa", "rfa_gate"])
def test_directions_and_their_version_are_saved_with_the_weights(name, tmp_path):
    model, tokens = decoder(name), torch.randint(0, 11, (1, 9))
    assert redraw(model) == 2
    save(model, tmp_path / "model")
    again = load(tmp_path / "model").model
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert [block.mixer.features.drawn for block in again.blocks] == [1, 1]
    assert not any("directions" in key for key, _ in again.named_parameters())


def test_calls_do_not_redraw_and_redrawing_changes_results():
    model, tokens = decoder("performer").train(), torch.randint(0, 11, (1, 9))
    first = model(tokens)[0]
    assert torch.equal(model(tokens)[0], first)
    redraw(model, torch.Generator().manual_seed(3))
    second = model(tokens)[0]
    assert not torch.allclose(second, first)
    redraw(model, torch.Generator().manual_seed(3))
    assert torch.equal(model(tokens)[0], second)


def test_a_state_of_an_earlier_draw_is_refused():
    mixer, x = Performer(8, heads=2, features=4), torch.randn(1, 3, 8)
    _, state, _ = mixer(x, Positions.range(1, 0, 3))
    mixer.features.redraw()
    with pytest.raises(
        ValueError,
        match=r"made with draw 0 of the random features, the mixer now has draw 1: begin from an empty",
    ):
        mixer(x, Positions.range(1, 3, 6), state)


def test_unknown_draws_kernels_and_counts_are_refused():
    with pytest.raises(ValueError, match="unknown draw 'orthogonl'; did you mean 'orthogonal'"):
        directions(3, 3, "orthogonl")
    with pytest.raises(ValueError, match="unknown draw 'normal'"):
        Positive(1, 1, 4, 4, "normal")
    with pytest.raises(ValueError, match="features=0 must be at least 1"):
        Positive(1, 1, 4, 0)
    with pytest.raises(ValueError, match="unknown kernel 'gauss'; did you mean 'gaussian'"):
        Unit(1, 1, 4, 4, "independent", "gauss")
