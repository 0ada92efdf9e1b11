"""Performer equals its features' recurrence with gradients, and does not repeat the released codes' leaks."""

import pytest
import torch
from reference.linear import bidirectional, project, recurrence
from reference.performer import positive, rectified
from test_linear import assert_equal_with_gradients, weights_of

from writehead.core.positions import Positions
from writehead.mixers.performer import Performer
from writehead.mixers.softmax import Softmax

KINDS = {
    "softmax": ({"features": 6}, lambda x, W: positive(x, W, 0.5)),
    "hyperbolic": ({"features": 5, "draw": "regularised"}, lambda x, W: positive(x, W, 0.5, hyperbolic=True)),
    "relu": ({"features": 6, "draw": "independent"}, lambda x, W: rectified(x, W, 0.5)),
    "relu without directions": ({"features": None, "kernel": "relu", "scale": 1.0}, lambda x, W: rectified(x, None, 1.0)),
    "softmax of another scale": ({"features": 6, "kernel": "softmax", "scale": 2.0}, lambda x, W: positive(x, W, 2.0)),
}  # fmt: skip


def expected(mixer, x, make, form):
    rows = []
    for row in x:
        q, k, v = project(row, *weights_of(mixer))
        W = mixer.features.directions[0]
        rows.append(form(make(q, W), make(k, W), v, lambda total: total).flatten(1))
    return torch.stack(rows) @ mixer.out.weight.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_every_kernel_is_the_recurrence_of_its_features(kind, kv_heads):
    options, make = KINDS[kind]
    mixer = Performer(16, heads=4, kv_heads=kv_heads, **{"kernel": kind, **options}).double()
    x, pos = torch.randn(2, 6, 16).double().requires_grad_(), Positions.range(2, 0, 6)
    wanted = (x, mixer.qkv.weight)
    assert_equal_with_gradients(mixer(x, pos)[0], expected(mixer, x, make, recurrence), wanted)
    assert_equal_with_gradients(mixer.encode(x, pos)[0], expected(mixer, x, make, bidirectional), wanted)


def test_a_huge_last_key_changes_no_earlier_output():
    """In performer-pytorch, where the maximum is taken over all keys, earlier outputs moved by 1.06."""
    mixer = Performer(8, heads=1, features=16)
    x = torch.randn(1, 9, 8)
    huge = x.clone()
    huge[:, -1] *= 1000
    with torch.no_grad():
        before, after = (mixer(t, Positions.range(1, 0, 9))[0] for t in (x, huge))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert bool(after.isfinite().all())


def test_with_many_features_it_is_softmax_attention():
    softmax = Softmax(16, heads=2, kv_heads=1).double()
    mixer = Performer(16, heads=2, kv_heads=1, features=20000, kernel="hyperbolic").double()
    mixer.load_state_dict(softmax.state_dict(), strict=False)
    x, pos = 0.7 * torch.randn(1, 12, 16).double(), Positions.range(1, 0, 12)
    with torch.no_grad():
        right, y = softmax(x, pos)[0], mixer(x, pos)[0]
    assert float((y - right).norm() / right.norm()) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "tanh"}, r"unknown kernel 'tanh' \(accepted: hyperbolic, relu, softmax\)"),
        ({"features": None}, "features=None needs kernel='relu'; kernel='softmax' is made of directions"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
    ],
)
def test_what_is_refused_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        Performer(8, heads=2, **options)
