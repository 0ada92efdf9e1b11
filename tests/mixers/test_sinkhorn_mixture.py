"""The Sinkhorn mixture is the sum of its parts, in one call and token by token."""

import pytest
import torch

from writehead.core.positions import Positions
from writehead.core.state import nbytes
from writehead.core.work import Call
from writehead.laws import check
from writehead.mixers.sinkhorn_mixture import SinkhornMixture
from writehead.positions.rope import Rotary


def make(**options) -> SinkhornMixture:
    return SinkhornMixture(16, **{"heads": 4, "window": 4, "blocks": 8, **options}).double().eval()


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 1, "position": Rotary(4)}, {"heads": 8, "quadratic_heads": 2}]
)
def test_both_kinds_of_heads_add_up_however_tokens_come(options):
    mixer = make(**options)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    with torch.no_grad():
        parts = [part(x, Positions.range(2, 0, 19))[0] for part in (mixer.sorted, mixer.quadratic)]
        assert min(float(part.abs().max()) for part in parts) > 1e-3
        state, steps = mixer.init_state(2, x), []
        for t in range(19):
            y, state, _ = mixer(x[:, t : t + 1], Positions.range(2, t, t + 1), state)
            steps.append(y)
    assert torch.allclose(torch.cat(steps, 1), sum(parts), rtol=1e-10, atol=1e-12)
    assert nbytes(state) == mixer.state_bytes(2, 19, 8)


@pytest.mark.parametrize("law", ["split", "causal", "padding", "select"])
def test_one_write_head_of_each_kind_obeys(law):
    verdict = check(SinkhornMixture(16, heads=4, kv_heads=1, window=4, blocks=8), law, length=13)
    assert verdict.passed, verdict


def test_quadratic_heads_read_what_sinkhorn_heads_may_not():
    mixer = make(quadratic_heads=1)
    assert (mixer.sorted.heads, mixer.quadratic.qkv.heads) == (3, 1)
    near, far = (mixer.quadratic.work(Call(context=n)).state_read for n in (100, 1000))
    assert far == 10 * near
    assert mixer.work(Call(context=100)).flops == sum(
        part.work(Call(context=100)).flops for part in (mixer.sorted, mixer.quadratic)
    )


@pytest.mark.parametrize("count", [0, 4])
def test_one_kind_alone_is_refused(count):
    with pytest.raises(
        ValueError, match=f"quadratic_heads={count} must be from 1 to 3: both kinds are needed"
    ):
        make(quadratic_heads=count)
