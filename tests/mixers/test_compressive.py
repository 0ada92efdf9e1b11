"""The Compressive Transformer equals the paper's algorithm; its loss teaches the compression and nothing
else."""

import pytest
import torch
from reference.compressive import compressive, conv, reconstruction
from test_transformer_xl import large, weights_of

from writehead.core.positions import Positions
from writehead.core.state import detach
from writehead.mixers.compressive import Compressive

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def compression_of(mixer, ratio):
    if mixer.compress.map is not None:
        return conv(mixer.compress.map.weight.unflatten(1, (ratio, -1)), mixer.compress.map.bias, ratio)
    kind = {"max": lambda g: g.amax(1), "mean": lambda g: g.mean(1)}[mixer.compress.kind]
    return lambda x: kind(x.unflatten(0, (-1, ratio)))


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    ("segment", "memory", "compressed", "ratio", "kind"),
    [(4, 4, 3, 2, "conv"), (2, 4, 9, 2, "max"), (6, 6, 2, 3, "mean"), (3, 3, 2, 1, "conv")],
)
def test_any_sizes_are_the_papers_algorithm_with_its_gradients(
    kv_heads, segment, memory, compressed, ratio, kind
):
    mixer = large(
        Compressive(
            8, heads=4, kv_heads=kv_heads, segment=segment, memory=memory, compressed=compressed,
            ratio=ratio, compression=kind,
        )
    )  # fmt: skip
    compress, w = compression_of(mixer, ratio), weights_of(mixer)
    x = torch.randn(2, 23, 8).double().requires_grad_()
    right = torch.stack([compressive(row, w, segment, memory, compressed, compress) for row in x])
    y = mixer(x, Positions.range(2, 0, 23))[0]
    torch.testing.assert_close(y, right, **EXACT)
    weight = torch.randn_like(y)
    wanted = {"x": x} | {n: p for n, p in mixer.named_parameters() if not n.startswith("compress")}
    ours = torch.autograd.grad((y * weight).sum(), list(wanted.values()), retain_graph=True)
    theirs = torch.autograd.grad((right * weight).sum(), list(wanted.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    ("segment", "memory", "compressed", "ratio"), [(2, 4, 3, 2), (3, 3, 1, 1), (4, 4, 5, 2)]
)
def test_single_tokens_find_every_slot_that_one_call_reads(segment, memory, compressed, ratio):
    sizes = {"segment": segment, "memory": memory, "compressed": compressed, "ratio": ratio}
    mixer = large(Compressive(8, heads=2, compression="max", **sizes))
    x, state, steps = torch.randn(2, 27, 8).double(), None, []
    with torch.no_grad():
        for t in range(27):
            y, state, _ = mixer(x[:, t : t + 1], Positions.range(2, t, t + 1), state)
            steps.append(y)
        torch.testing.assert_close(torch.cat(steps, 1), mixer(x, Positions.range(2, 0, 27))[0], **EXACT)


def test_the_language_models_loss_does_not_reach_the_compression():
    mixer = large(Compressive(8, heads=2, segment=4, memory=4, compressed=4))
    y, _, _ = mixer(torch.randn(1, 20, 8).double(), Positions.range(1, 0, 20))
    y.sum().backward()
    assert mixer.compress.map.weight.grad is None
    assert mixer.qkv.weight.grad is not None


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_reconstruction_loss_is_the_papers_and_reaches_the_compression_only(kv_heads):
    mixer = large(Compressive(8, heads=2, kv_heads=kv_heads, segment=4, memory=8, compressed=4)).train()
    x = torch.randn(1, 21, 8).double().requires_grad_()
    _, _, aux = mixer(x, Positions.range(1, 0, 21))
    w = {name: value.detach() for name, value in weights_of(mixer).items()}
    right = reconstruction(x[0].detach(), w, 4, 8, compression_of(mixer, 2))
    torch.testing.assert_close(aux["reconstruction"], right, **EXACT)
    compression = mixer.compress.map.weight
    (theirs,) = torch.autograd.grad(right, compression)
    aux["reconstruction"].backward()
    torch.testing.assert_close(compression.grad, theirs, **EXACT)
    assert float(compression.grad.abs().max()) > 1e-3
    assert x.grad is None
    assert [n for n, p in mixer.named_parameters() if p.grad is not None] == [
        "compress.map.weight", "compress.map.bias",
    ]  # fmt: skip


def test_segment_by_segment_with_detached_states_the_losses_weigh_as_in_one_call():
    mixer = large(Compressive(8, heads=2, segment=4, memory=4, compressed=4)).train()
    x = torch.randn(2, 16, 8).double()
    whole = mixer(x, Positions.range(2, 0, 16))[2]["reconstruction"]
    state, losses = None, []
    for begin in range(0, 16, 4):
        _, state, aux = mixer(x[:, begin : begin + 4], Positions.range(2, begin, begin + 4), state)
        losses.append(aux["reconstruction"].detach())
        state = detach(state)
    assert float(losses[0]) == 0
    torch.testing.assert_close(torch.stack(losses[1:]).mean(), whole.detach(), **EXACT)


def test_the_loss_appears_in_training_only_and_where_something_learns_from_it():
    x, pos = torch.randn(1, 9, 8), Positions.range(1, 0, 9)
    conv_, max_ = (Compressive(8, segment=4, memory=4, compression=kind) for kind in ("conv", "max"))
    assert set(conv_.train()(x, pos)[2]) == {"reconstruction"}
    assert conv_.eval()(x, pos)[2] == {}
    assert max_.train()(x, pos)[2] == {}
    with torch.no_grad():
        assert conv_.train()(x, pos)[2] == {}


def test_training_on_the_loss_makes_reading_the_compressed_memory_more_faithful():
    mixer = Compressive(16, heads=2, segment=8, memory=8, compressed=8, ratio=4).train()
    optimiser = torch.optim.Adam(mixer.compress.parameters(), 1e-2)
    x, losses = torch.randn(4, 32, 16), []
    for _ in range(60):
        loss = mixer(x, Positions.range(4, 0, 32))[2]["reconstruction"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compressive(8, segment=5), "segment=5 must be a positive multiple of ratio=2; nearest is 4"),
        (
            lambda: Compressive(8, segment=4, memory=6),
            "memory=6 must be a positive multiple of segment=4; nearest is 8",
        ),
        (
            lambda: Compressive(8, compressed=0),
            "compressed=0 must be at least 1; without it use transformer_xl",
        ),
        (lambda: Compressive(8, compression="convolution"), "unknown compression 'convolution'"),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
