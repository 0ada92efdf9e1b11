"""Calls so long that segment memories go over them window by window: equal to one window, and linear in cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from writehead.catalog import MIXERS, build
from writehead.core.pattern import Window
from writehead.core.positions import Positions
from writehead.mixers import softmax

T = 90
SPECS = {
    "transformer_xl": {"name": "transformer_xl", "segment": 5, "memory": 6},
    "sliding_xl": {"name": "sliding_xl", "memory": 9},
    "compressive": {"name": "compressive", "segment": 4, "memory": 4, "compressed": 4},
    "long_short": {"name": "long_short", "window": 7, "chunk": 4, "rank": 2},
    "synthesizer": {"name": "synthesizer_mixed", "max_context": T + 3},
    "most_used": {"name": "most_used", "segment": 4, "memory": 4, "compressed": 3},
}
PLACES = {
    "in place": torch.arange(T).expand(2, T),
    "from a later position on": torch.arange(3, T + 3).expand(2, T),
    "padded": torch.stack([torch.arange(T), torch.cat([torch.full((7,), -1), torch.arange(T - 7)])]),
    "padded between": torch.stack([torch.arange(T), torch.where(torch.arange(T) // 20 == 1, -1, torch.arange(T))]),
}  # fmt: skip


def mixer_of(name, **options):
    return build(MIXERS, {**SPECS[name], "heads": 2, **options}, dim=8, position=None).double()


def both_passes(mixer, index):
    torch.manual_seed(0)
    x = torch.randn(*index.shape, 8).double().requires_grad_()
    y, _, _ = mixer(x, Positions(index))
    weight = torch.randn_like(y) * (index >= 0)[..., None]
    wanted = (x, *mixer.parameters())
    return y * (index >= 0)[..., None], torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", [name for name in SPECS if name != "most_used"])
def test_a_call_in_many_windows_is_one_window_with_its_gradients(monkeypatch, name, places):
    mixer, index = mixer_of(name), PLACES[places]
    y, grads = both_passes(mixer, index)
    monkeypatch.setattr(softmax, "SCORES", 70)
    count = len(softmax._views(Positions(index), index, Window(4), True))
    assert count == T // 16 + 1
    cut, cut_grads = both_passes(mixer, index)
    torch.testing.assert_close(cut, y, rtol=1e-10, atol=1e-11)
    for ours, right in zip(cut_grads, grads, strict=True):
        if right is not None:
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)


class Touched(TorchDispatchMode):
    """Counts the bytes that operations are given and make, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
            Touched.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return made


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer_xl", "sliding_xl", "compressive", "most_used"])
def test_one_token_touches_as_much_behind_a_long_past_as_behind_a_short_one(name):
    mixer = mixer_of(name)
    state, counts = None, {}
    for first, size in (
        (0, 60),
        *((60 + t, 1) for t in range(4)),
        (64, 536),
        *((600 + t, 1) for t in range(4)),
    ):
        Touched.bytes = 0
        with Touched():
            _, state, _ = mixer(
                torch.zeros(1, size, 8).double(), Positions.range(1, first, first + size), state
            )
        counts[first] = Touched.bytes
    assert [counts[60 + t] for t in range(4)] == [counts[600 + t] for t in range(4)]


def touched(mixer, tokens):
    Touched.bytes = 0
    x = torch.zeros(1, tokens, 8, requires_grad=True)
    with Touched():
        y, _, aux = mixer(x, Positions.range(1, 0, tokens))
        torch.autograd.grad(y.sum() + sum(aux.values()), [x, *mixer.parameters()], allow_unused=True)
    return Touched.bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_xl", "sliding_xl", "compressive", "most_used"])
def test_everything_that_both_passes_touch_grows_no_faster_than_the_sequence(monkeypatch, name):
    monkeypatch.setattr(softmax, "SCORES", 1 << 12)
    sizes = {"memory": 16} if name == "sliding_xl" else {"segment": 16, "memory": 16}
    more = {"compressed": 16} if name in ("compressive", "most_used") else {}
    spec = {"name": name, "heads": 1, **sizes, **more}
    mixer = build(MIXERS, spec, dim=8, position=None)
    short, long = touched(mixer, 512), touched(mixer, 1024)
    assert long < 2.06 * short  # the first windows have no memory yet
