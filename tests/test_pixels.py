"""Models of images: orders, levels, distributions, laws of the whole decoder, draws, and every refusal."""

import math

import pytest
import torch
from reference import pixels as paper
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.decode.images import draw_images, sheet
from writehead.laws import Layers, check
from writehead.model.decoder import Decoder
from writehead.model.pixels import Frame, frame_of, log_levels
from writehead.positions.grid import Grid

IMAGE = {"name": "categorical", "height": 4, "width": 6, "levels": 5}
SMALL = {"vocab": 6, "dim": 16, "depth": 2, "position": {"name": "grid", "shape": [4, 6]}, "pixels": IMAGE}


def model(**values):
    torch.manual_seed(0)
    given = {**SMALL, "mixer": {"name": "image_1d", "heads": 2, "block": 6, "memory": 12}, **values}
    made = Decoder(ModelConfig.from_dict(given)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


@pytest.mark.parametrize("patch", [None, (2, 3), (4, 2), (1, 6)])
def test_positions_run_in_the_papers_order_and_images_come_back(patch):
    frame = Frame(4, 6, levels=256, patch=patch)
    images = torch.arange(24, dtype=torch.uint8).view(1, 4, 6, 1) * 10
    tokens = frame.tokens(images)
    assert tokens[0].tolist() == [int(images[0, r, c, 0]) for r, c in paper.order(4, 6, patch)]
    assert torch.equal(frame.images(tokens), images)


def test_a_pixels_channels_are_neighbours_and_patches_count_them():
    image = torch.arange(24, dtype=torch.uint8).view(1, 2, 4, 3)
    assert Frame(2, 4, 3).tokens(image)[0].tolist() == list(range(24))
    blocked = Frame(2, 4, 3, patch=(2, 6))
    assert blocked.tokens(image)[0].tolist() == [*range(6), *range(12, 18), *range(6, 12), *range(18, 24)]
    assert torch.equal(blocked.images(blocked.tokens(image)), image)


def test_levels_are_equal_steps_and_come_back_from_black_to_white():
    frame = Frame(1, 256, levels=4)
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)
    tokens = frame.tokens(grey)
    assert tokens[0].bincount().tolist() == [64] * 4
    assert bool((tokens[0].diff() >= 0).all())
    assert frame.images(tokens).unique().tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_the_mixture_is_the_papers_and_adds_up_to_one(levels):
    torch.manual_seed(1)
    mixture = torch.randn(3, 3, dtype=torch.float64) - torch.tensor([0.0, 0.0, 1.5])[:, None]
    logs = log_levels(mixture, levels)
    right = [paper.mixture(*mixture.tolist(), level, levels) for level in range(levels)]
    torch.testing.assert_close(logs.exp(), torch.tensor(right, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    assert abs(float(logs.logsumexp(-1))) < 1e-12


def test_the_mixture_stays_finite_far_from_its_means_and_has_gradients():
    mixture = torch.tensor([[0.0], [1.0], [-9.0]], requires_grad=True)  # a needle at the highest level
    logs = log_levels(mixture, 256)
    assert bool(logs.isfinite().all())
    (gradient,) = torch.autograd.grad(logs[0], mixture)
    assert bool(gradient.isfinite().all())
    assert float(gradient[1, 0]) < 0  # moving the needle away from level 0 makes it less likely


def test_the_mixtures_gradient_is_the_slope():
    torch.manual_seed(2)
    mixture = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: log_levels(m, 6), mixture)


@pytest.mark.parametrize("name", ["categorical", "logistics"])
def test_the_probabilities_of_all_images_add_up_to_one(name):
    made = model(
        vocab=3, position={"name": "grid", "shape": [2, 3]},
        pixels={"name": name, "height": 2, "width": 3, "levels": 2},
    )  # fmt: skip
    every = torch.cartesian_prod(*[torch.arange(2)] * 6)
    inputs = torch.cat([torch.full((64, 1), 2), every[:, :-1]], 1)
    with torch.no_grad():
        logits, _ = made(inputs)
    nll = F.cross_entropy(logits.flatten(0, 1), every.flatten(), reduction="none").view(64, 6).sum(1)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_each_channel_has_levels_of_its_own():
    made = model(
        vocab=6, position={"name": "none"}, pixels={**IMAGE, "height": 2, "width": 2, "channels": 3}
    ).embedding  # fmt: skip
    tokens = torch.tensor([[5, 1, 1, 1, 1]])
    x = made(tokens, Positions.range(1, 0, 5))[0]
    assert torch.equal(x[0], made.table[15])
    assert [int((made.table == row).all(1).nonzero()) for row in x[1:]] == [1, 6, 11, 1]


@pytest.mark.parametrize("patch", [None, [2, 3], [2, 2]])
@pytest.mark.parametrize("name", ["categorical", "logistics"])
def test_a_colour_image_has_the_probability_of_its_formula_with_gradients(name, patch):
    beside = {} if patch is None else {"patch": patch}
    made = model(
        vocab=6,
        position={"name": "grid", "shape": [4, 2, 3] if patch is None else [4, 6], **beside},
        pixels={**IMAGE, "name": name, "width": 2, "channels": 3, **beside},
    )
    frame, parameters = made.embedding.frame, list(made.parameters())
    image = torch.randint(0, 256, (4, 2, 3), dtype=torch.uint8)
    read, said = paper.inputs(image.tolist(), 5, None if patch is None else tuple(patch))
    target = frame.tokens(image[None])
    assert target[0].tolist() == said
    logits, _ = made(torch.cat([torch.tensor([[frame.start]]), target[:, :-1]], 1))
    ours = F.cross_entropy(logits[0], target[0], reduction="sum")
    pos = Positions.range(1, 0, 24)
    x = made.embedding.table[read][None] + made.embedding.position.embed(pos, torch.float64)
    y, _ = made.stack.whole(x, pos, ((None, None),) * 2)
    if name == "categorical":
        theirs = F.cross_entropy(y[0] @ made.embedding.output.T, torch.tensor(said), reduction="sum")
    else:
        each = (y[0] @ made.embedding.output.T).unflatten(-1, (3, 10)) + made.embedding.shift
        found = [
            paper.mixture(*(part.tolist() for part in one), level, 5)
            for one, level in zip(each, said, strict=True)
        ]
        assert ours.item() == pytest.approx(-sum(map(math.log, found)), rel=1e-9)
        theirs = -log_levels(each, 5).gather(-1, torch.tensor(said)[:, None]).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("law", ["split", "causal", "padding", "select"])
def test_a_decoder_in_two_dimensions_obeys_the_laws(law):
    made = model(
        position={"name": "grid", "shape": [12, 6], "patch": [2, 3]},
        pixels={**IMAGE, "height": 12, "patch": [2, 3]},
        mixer={"name": "image_2d", "heads": 2, "image_width": 6, "patch": [2, 3], "margin": [2, 3]},
    )
    verdict = check(Layers(made), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", ["categorical", "logistics"])
def test_drawn_images_have_the_log_probability_that_one_call_gives(name):
    made = model(pixels={**IMAGE, "name": name})
    found, timings = draw_images(made, 3, seed=5)
    assert timings.decode_tokens == 3 * 23
    frame = made.embedding.frame
    tokens = frame.tokens(found)
    assert torch.equal(found, draw_images(made, 3, seed=5)[0])
    assert len(tokens.unique(dim=0)) == 3
    state = made.init_state(3)
    steps = torch.cat([torch.full((3, 1), frame.start), tokens[:, :-1]], 1)
    whole, _ = made(steps)
    for t in range(24):
        logits, state = made.step(steps[:, t : t + 1], state)
        torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-9, atol=1e-9)


def test_draws_follow_the_models_distribution():
    made = model(
        vocab=3, position={"name": "grid", "shape": [1, 2]},
        pixels={"name": "categorical", "height": 1, "width": 2, "levels": 2},
    )  # fmt: skip
    found, _ = draw_images(made, 4000, seed=0)
    tokens = made.embedding.frame.tokens(found)
    share = (2 * tokens[:, 0] + tokens[:, 1]).bincount(minlength=4) / 4000
    every = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    logits, _ = made(torch.cat([torch.full((4, 1), 2), every[:, :-1]], 1))
    right = logits.log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1).exp()
    for one, expected in zip(share.tolist(), right.tolist(), strict=True):
        assert abs(one - expected) < 5 * math.sqrt(expected / 4000)


def test_a_sheet_holds_every_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 3, 1)
    found = sheet(images, 3, scale=2, gap=1)
    assert found.shape == (11, 22, 1)
    assert [int(found[y, x]) for y in (1, 6) for x in (1, 8, 15)] == [0, 1, 2, 3, 4, 128]
    assert int(found[0, 0]) == int(found[5, 1]) == 128
    assert int(found[4, 6]) == 0


def test_grid_positions_add_the_axes_up_and_follow_the_blocks():
    scheme = Grid(4, shape=[2, 3, 2])
    found = scheme.embed(Positions.range(1, 0, 12), torch.float32)[0]
    a, b, c = scheme.tables
    right = [a[i] + b[j] + c[k] for i in range(2) for j in range(3) for k in range(2)]
    torch.testing.assert_close(found, torch.stack(right))
    blocked = Grid(4, shape=[4, 6], patch=[2, 3])
    found = blocked.embed(Positions.range(1, 0, 24), torch.float32)[0]
    rows, columns = blocked.tables
    torch.testing.assert_close(
        found, torch.stack([rows[r] + columns[c] for r, c in paper.order(4, 6, (2, 3))])
    )
    with pytest.raises(ValueError, match="position 24 does not exist"):
        blocked.embed(Positions.range(1, 24, 25), torch.float32)


def test_grid_tables_start_as_the_paper_says():
    torch.manual_seed(0)
    tables = Grid(64, shape=[500, 400, 3]).tables
    for table in tables[:2]:
        assert float(table.detach().std()) == pytest.approx(0.125 / math.sqrt(64 * 3), rel=0.03)


def test_a_config_of_images_goes_to_plain_values_and_back():
    config = ModelConfig.from_dict({**SMALL, "mixer": {"name": "mqa", "heads": 2}})
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["pixels"] == IMAGE
    assert frame_of(config.pixels) == Frame(4, 6, levels=5)


REFUSED = [
    ({"vocab": 5}, r"vocab=5 must be levels \+ 1 = 6: the levels, and the token that begins"),
    ({"pixels": {**IMAGE, "levels": 300}, "vocab": 301}, "levels=300 must be from 2 to 256"),
    ({"pixels": {**IMAGE, "channels": 2}}, "channels=2 1 or 3"),
    ({"pixels": {**IMAGE, "patch": [3, 3]}}, "height=4 must be a positive multiple of patch rows=3"),
    ({"pixels": {**IMAGE, "patch": [2, 4]}}, "width in positions=6 must be a positive multiple of patch col"),
    ({"pixels": {**IMAGE, "patch": [2]}}, r"patch=\[2\] must be two numbers of at least 1"),
    ({"pixels": {"name": "categorical", "height": 3}}, "categorical needs width"),
    ({"pixels": {**IMAGE, "name": "logistic"}}, "unknown name .pixels. 'logistic'; did you mean 'logistics'"),
    ({"pixels": {**IMAGE, "mixtures": 3}}, "categorical takes no argument 'mixtures'"),
    ({"pixels": {**IMAGE, "name": "logistics", "mixtures": 0}}, "mixtures=0 must be at least 1"),
    ({"pixels": 3}, "pixels must be a spec"),
    ({"embed_scale": 2.0}, "embed_scale=2.0 is for tokens; a model of pixels has none"),
    ({"head_bias": True}, "head_bias=True is for tokens"),
    ({"kind": "encoder", "mixer": {"name": "bidirectional"}}, "pixels belong to a model of kind 'decoder'"),
    (
        {"stack": {"name": "reversible", "output": "concat"}, "tie_embeddings": False},
        'a model of pixels reads vectors of width dim: its stack needs output="mean"',
    ),
    ({"position": {"name": "grid", "shape": [4]}}, r"shape=\[4\] must name at least two axes"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_images_that_do_not_fit_are_refused(values, message):
    given = {**SMALL, "mixer": {"name": "mha", "heads": 2}, **values}
    with pytest.raises(ValueError, match=message):
        Decoder(ModelConfig.from_dict(given))


def test_what_is_no_level_and_no_image_model_is_refused():
    made = model()
    with pytest.raises(ValueError, match=r"token 6 is no level of 5 \(0 to 4, 5 begins\)"):
        made(torch.tensor([[6]]))
    with pytest.raises(ValueError, match="position 24 does not exist"):
        made(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        draw_images(made, 0)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        draw_images(made, 1, temperature=0)
    words = Decoder(ModelConfig(vocab=6, dim=8, depth=1, mixer={"name": "mqa", "heads": 2}))
    with pytest.raises(ValueError, match="this model is not one of images"):
        draw_images(words, 1)
    with pytest.raises(ValueError, match="categorical needs height"):
        frame_of({"name": "categorical"})
