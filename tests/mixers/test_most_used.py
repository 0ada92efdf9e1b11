"""Most-used compression keeps the tokens that were read most, however a sequence is cut."""

import pytest
import torch
from reference.most_used import most_used
from test_transformer_xl import large, weights_of

from writehead.core.positions import Positions
from writehead.core.state import CannotRewind, nbytes, rewind
from writehead.mixers.most_used import MostUsed, most_read

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZES = [(4, 4, 3, 2), (2, 4, 9, 2), (6, 6, 2, 3), (3, 3, 4, 1)]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("segment", "memory", "compressed", "ratio"), SIZES)
def test_any_sizes_are_the_papers_loop_with_its_gradients(kv_heads, segment, memory, compressed, ratio):
    sizes = {"segment": segment, "memory": memory, "compressed": compressed, "ratio": ratio}
    mixer = large(MostUsed(8, heads=4, kv_heads=kv_heads, **sizes))
    x, w = torch.randn(2, 19, 8).double().requires_grad_(), weights_of(mixer)
    right = torch.stack([most_used(row, w, segment, memory, compressed, ratio) for row in x])
    y, _, aux = mixer(x, Positions.range(2, 0, 19))
    torch.testing.assert_close(y, right, **EXACT)
    assert aux == {}
    weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("segment", "memory", "compressed", "ratio"), SIZES)
def test_single_tokens_keep_what_one_call_keeps(segment, memory, compressed, ratio):
    sizes = {"segment": segment, "memory": memory, "compressed": compressed, "ratio": ratio}
    mixer = large(MostUsed(8, heads=2, **sizes))
    x, state, steps = torch.randn(2, 27, 8).double(), None, []
    for t in range(27):
        y, state, _ = mixer(x[:, t : t + 1], Positions.range(2, t, t + 1), state)
        steps.append(y)
        assert nbytes(state) == mixer.state_bytes(2, t + 1, 8)
    torch.testing.assert_close(torch.cat(steps, 1), mixer(x, Positions.range(2, 0, 27))[0], **EXACT)
    with pytest.raises(CannotRewind):
        rewind(state, torch.ones(2, dtype=torch.int64))


def test_the_most_read_places_stay_in_their_order_and_the_earlier_of_equal_ones():
    attention = torch.tensor([[0.1, 3.0, 2.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert most_read(attention, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"segment": 5}, "segment=5 .* ratio=2"),
        ({"segment": 4, "memory": 6}, "memory=6 .* segment=4"),
        ({"compressed": 0}, "compressed=0 must be at least 1; without it use transformer_xl"),
    ],
)
def test_what_the_mixer_refuses_it_says(sizes, message):
    with pytest.raises(ValueError, match=message):
        MostUsed(8, **sizes)
