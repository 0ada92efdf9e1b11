"""ops.scan: any chunk, any cut, any gains equal a token-by-token loop, with gradients; nothing overflows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.ops.scan import NOTHING, Sums, empty, scan, whole
from writehead.ops.scan_chunks import Rule

PLAIN, FLOOR = Rule(1e-6, floor=False), Rule(3.0, floor=True)
B, G, M, E = 2, 2, 3, 5


def loop(q, k, v, state, rule, decay=None, gain=None):
    """The recurrence as it is written, in the sums' true size."""
    s = state.s if state.top is None else state.s * state.top.exp()[..., None, None]
    rows = []
    for t in range(q.shape[1]):
        added = k[:, t, :, :, None] * torch.cat([v[:, t], torch.ones_like(v[:, t, :, :1])], -1)[:, :, None]
        s = s if decay is None else s * decay[:, t].exp()[..., None, None]
        s = s + (added if gain is None else added * gain[:, t].exp()[..., None, None])
        y = (q[:, t].unflatten(1, (G, -1)) @ s).flatten(1, 2)
        rows.append(y[..., :E] / rule.denominator(y[..., E:]))
    return torch.stack(rows, 1), s


def draw(T, H=4, *, decays=True, gains=True, top=False):
    def leaf(t):
        return t.double().requires_grad_()

    q, k, v = leaf(torch.rand(B, T, H, M)), leaf(torch.rand(B, T, G, M)), leaf(torch.randn(B, T, G, E))
    state = Sums(leaf(torch.rand(B, G, M, E + 1)), torch.randn(B, G).double() if top else None)
    logs = {"decay": leaf(-3 * torch.rand(B, T, G))} if decays else {}
    return q, k, v, state, logs | ({"gain": leaf(torch.randn(B, T, G))} if gains else {})


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
@pytest.mark.parametrize("rule", [PLAIN, FLOOR], ids=["plus", "floor"])
@pytest.mark.parametrize(("decays", "gains"), [(False, False), (True, False), (False, True), (True, True)])
def test_any_chunk_is_the_loop_with_gradients(chunk, rule, decays, gains):
    q, k, v, state, logs = draw(11, decays=decays, gains=gains)
    y, after = scan(q, k, v, state, rule, **logs, chunk=chunk)
    right, sums = loop(q, k, v, state, rule, **logs)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.s, sums, rtol=1e-12, atol=1e-12)
    wanted = (q, k, v, state.s, *logs.values())
    a, b = torch.randn_like(y), torch.randn_like(sums)
    ours = torch.autograd.grad((y * a).sum() + (after.s * b).sum(), wanted)
    theirs = torch.autograd.grad((right * a).sum() + (sums * b).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_running_maximum_changes_no_result_and_no_gradient(chunk, decays):
    q, k, v, state, logs = draw(11, decays=decays, top=True)
    rule = Rule(0.0, floor=False)
    y, after = scan(q, k, v, state, rule, **logs, chunk=chunk)
    right, sums = loop(q, k, v, state, rule, **logs)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.s * after.top.exp()[..., None, None], sums, rtol=1e-12, atol=1e-12)
    wanted, a = (q, k, v, state.s, *logs.values()), torch.randn_like(y)
    ours = torch.autograd.grad((y * a).sum(), wanted)
    theirs = torch.autograd.grad((right * a).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5), decays=st.booleans(), top=st.booleans())
def test_any_cut_gives_the_whole(cuts, decays, top):
    with torch.no_grad():
        q, k, v, state, logs = draw(sum(cuts), H=2, decays=decays, top=top)
        right, end = scan(q, k, v, Sums(state.s.clone(), state.top), PLAIN, **logs, chunk=4)
        pieces, at = [], 0
        for size in cuts:
            part = slice(at, at + size)
            now = {name: t[:, part] for name, t in logs.items()}
            y, state = scan(q[:, part], k[:, part], v[:, part], state, PLAIN, **now, chunk=4)
            pieces.append(y)
            at += size
    torch.testing.assert_close(torch.cat(pieces, 1), right, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.s, end.s, rtol=1e-11, atol=1e-12)
    if top:
        assert torch.equal(state.top, end.top)


@pytest.mark.parametrize("steps", [1, 8])
def test_gains_of_any_size_neither_overflow_nor_reach_back(steps):
    """In float32 exp(1000) is infinite; a huge later key must change nothing before it, to the last bit."""
    q, k, v = torch.rand(1, 8, 1, M), torch.rand(1, 8, 1, M), torch.randn(1, 8, 1, E)
    gain = torch.tensor([-1000.0, -1001.0, 900.0, 901.0, 5000.0, 0.0, 4999.0, 1.0])[None, :, None]

    def run(gain):
        state, rows = empty(1, 1, M, E, q, rescale=True), []
        for part in torch.arange(8).split(8 // steps):
            y, state = scan(q[:, part], k[:, part], v[:, part], state, PLAIN, gain=gain[:, part])
            rows.append(y)
        return torch.cat(rows, 1), state

    y, state = run(gain)
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y[0, 0, 0], v[0, 0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[0, 4, 0], v[0, 4, 0], rtol=1e-4, atol=1e-4)
    assert float(state.top) == 5000
    earlier, _ = run(gain.masked_fill(torch.arange(8)[None, :, None] >= 4, -2000.0))
    torch.testing.assert_close(y[:, :4], earlier[:, :4], rtol=1e-6, atol=1e-6)


def test_a_key_without_gain_or_features_is_not_remembered():
    q, k, v, state, _ = draw(6, top=True)
    with torch.no_grad():
        still = {"decay": torch.zeros(B, 6, G).double(), "gain": torch.full((B, 6, G), NOTHING).double()}
        _, after = scan(q, torch.zeros_like(k), v, state, PLAIN, **still)
        _, step = scan(q[:, :1], torch.zeros_like(k[:, :1]), v[:, :1], Sums(state.s.clone(), state.top), PLAIN,
                       **{name: t[:, :1] for name, t in still.items()})  # fmt: skip
    for one in (after, step):
        assert torch.equal(one.s, state.s)
        assert torch.equal(one.top, state.top)


def test_one_token_is_written_in_place_only_without_autograd():
    q, k, v, state, _ = draw(1, decays=False, gains=False)
    before = state.s.detach().clone()
    _, after = scan(q, k, v, state, PLAIN)
    assert torch.equal(state.s, before)
    assert after.s.requires_grad
    with torch.no_grad():
        held = Sums(state.s.detach(), None)
        _, after = scan(q, k, v, held, PLAIN)
    assert after.s.data_ptr() == held.s.data_ptr()


def test_a_floor_stops_the_gradient_of_the_denominator():
    q, k, v, _, _ = draw(4)
    y, _ = scan(q, k, v, empty(B, G, M, E, q), Rule(1e6, floor=True))
    right = loop(q, k, v, empty(B, G, M, E, q), Rule(1e6, floor=True))[0]
    a = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad((y * a).sum(), (q, k)),
        torch.autograd.grad((right * a).sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-20)


def test_the_bidirectional_form_ends_where_the_causal_one_does():
    q, k, v, _, _ = draw(9)
    y, _ = scan(q, k, v, empty(B, G, M, E, q), PLAIN)
    torch.testing.assert_close(whole(q, k, v, PLAIN)[:, -1], y[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"k": torch.rand(B, 4, G, M + 1)}, rf"k must have shape \(B={B}, T=4, G, M={M}\)"),
        ({"v": torch.rand(B, 3, G, E)}, rf"v must have shape \(B={B}, T=4, G={G}, E\)"),
        ({"q": torch.rand(B, 4, 3, M)}, "heads=3 must be a positive multiple of kv_heads=2; nearest is 4"),
        ({"state": empty(B, G, M, E + 1, torch.zeros(1))}, r"state.s must have shape \(B=2, G=2, M=3, E\+1=6\)"),
        ({"state": empty(B, G, M, E, torch.zeros(1), rescale=True)}, "needs the log gains of the keys; got gain=None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    given = {"q": torch.rand(B, 4, 4, M), "k": torch.rand(B, 4, G, M), "v": torch.rand(B, 4, G, E)}
    given |= {"state": empty(B, G, M, E, torch.zeros(1)), "rule": PLAIN} | change
    with pytest.raises(ValueError, match=message):
        scan(**given)
