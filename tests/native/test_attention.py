"""The attention kernel against its definition: cache types, shapes, windows, penalties, ragged rows, rings."""

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from writehead.native import structs
from writehead.native.build import FOLDER
from writehead.native.library import load, runnable
from writehead.native.structs import FORMATS

ROUNDING = 3e-6  # of values around 1: float32 sums of up to some hundred terms


class Kernel:
    """A library and its threads."""

    def __init__(self, name: str, threads: int) -> None:
        path = FOLDER / f"libwritehead_{name}.so"
        if not path.exists():
            pytest.skip(f"{path.name} was not built; run python -m writehead.native.build")
        self.library = load(path)
        self.team = self.library.wh_team_create(threads)

    def attend(self, case: "Case", layer: int) -> Tensor:
        y = torch.full_like(case.q, 7.0)
        pointers = [structs.pointer(t) for t in (case.k, case.v, case.k_scale, case.v_scale, case.pos)]
        B, T, H, D = case.q.shape
        cache = structs.Cache(
            FORMATS.index(str(case.k.dtype)[6:]),
            case.k.shape[1],
            H,
            case.k.shape[2],
            D,
            case.pos.shape[1],
            0,
            0,
            *pointers,
        )
        done = self.library.wh_attend(
            self.team, ctypes.byref(cache), layer, 1, B, T, structs.pointer(case.q), structs.pointer(case.q_pos),
            case.scale, case.window, case.lead, structs.pointer(case.slopes), structs.pointer(y),
        )  # fmt: skip
        assert done == 0
        return y


class Case:
    """Random queries over a random cache of two layers, a ring with empty slots."""

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, **values: Any) -> None:
        B, T, H, G, D, S = (shape[letter] for letter in "BTHGDS")
        self.scale, self.window, self.lead = D**-0.5, 0, 0
        self.slopes: Tensor | None = None
        for name, value in values.items():
            setattr(self, name, value)
        self.q = 2 * torch.randn(B, T, H, D)
        wide = -(-D // 16) * 16
        shapes = [(S // 16, D, 16), (S // 16, 16, wide)]
        if dtype != torch.float32:
            shapes = [(S // 16, -(-D // 2), 16, 2), (S // 16, 8, wide, 2)]
        k, v = (torch.randn(B, 2, G, *shape) for shape in shapes)
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            k, v = ((20 * t).round().clamp(-127, 127) for t in (k, v))
            self.k_scale, self.v_scale = (0.02 + 0.02 * torch.rand(B, 2, G, S) for _ in range(2))
        self.k, self.v = k.to(dtype), v.to(dtype)
        # as a ring keeps them: position p in slot p mod S
        self.pos = (torch.arange(S) + S * torch.randint(0, 3, (B, S))).int()
        self.pos[torch.rand(B, S) < 0.2] = -1
        self.q_pos = torch.randint(0, 3 * S, (B, T)).int().sort(1).values

    def expected(self, layer: int) -> tuple[Tensor, Tensor]:
        """The definition in float64, and what rounding may cost; 0 for a query that may read nothing."""
        H, D = self.q.shape[2:]
        G, q, unit = self.k.shape[2], self.q.double(), torch.ones(1, 1, 1, 1)
        k, v = self.k[:, layer].double(), self.v[:, layer].double()
        if self.k.dtype == torch.float32:
            k, v = k.transpose(-1, -2), v.flatten(2, 3)  # (B, G, S/16, 16, D), (B, G, S, D)
        else:
            k, v = k.transpose(3, 4).flatten(4), v.transpose(4, 5).flatten(2, 4)
        if self.k_scale is not None and self.v_scale is not None:
            k = k * self.k_scale[:, layer].double().unflatten(-1, (-1, 16))[..., None]
            unit = self.v_scale[:, layer].double()[..., None]
            v, q = v * unit, rounded(self.q)
        k = k[..., :D].flatten(2, 3)
        k, v, unit = (t.repeat_interleave(H // G, 1) for t in (k, v[..., :D], unit.expand(*v.shape[:3], 1)))
        scores = self.scale * torch.einsum("bthd,bhsd->bhts", q, k)
        p, q = self.pos[:, None, None, :], self.q_pos[:, None, :, None]
        if self.slopes is not None:
            scores = scores - self.slopes.double()[:, None, None] * (q - p).abs()
        seen = (p >= 0) & (p <= q)
        if self.window:
            seen &= (q - p < self.window) | (p < self.lead)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        y = torch.einsum("bhts,bhsd->bthd", weights, v)
        if self.v_scale is None:
            return y, torch.zeros_like(y)
        # weights of 8-bit values are rounded to 16 bits of the largest of some keys: half a unit for each key
        largest = (weights * unit.mT).amax(-1)
        return y, torch.einsum("bht,bhsd->bthd", largest / 65534, (v / unit).abs())


def rounded(q: Tensor) -> Tensor:
    """Queries (B, T, H, D) as integers that no sum of D products with 8 bits overflows 32 bits with."""
    limit = min(32767, (2**31 - 1) // 128 // q.shape[-1])
    top = q.abs().amax(-1, keepdim=True)
    return (q * (limit / top)).round().double() * (top.double() / limit)


@pytest.fixture(
    scope="module", params=[(name, threads) for name in runnable() for threads in (1, 2)], ids=str
)
def kernel(request):
    kernel = Kernel(*request.param)
    yield kernel
    kernel.library.wh_team_free(kernel.team)


def assert_right(kernel: Kernel, case: Case) -> None:
    for layer in (0, 1):
        expected, rounding = case.expected(layer)
        excess = (kernel.attend(case, layer).double() - expected).abs() - rounding
        assert excess.max() <= ROUNDING


SHAPES = [
    {"B": 1, "T": 1, "H": 1, "G": 1, "D": 4, "S": 16},
    {"B": 2, "T": 1, "H": 6, "G": 2, "D": 20, "S": 48},
    {"B": 1, "T": 1, "H": 9, "G": 3, "D": 64, "S": 1040},
    {"B": 1, "T": 1, "H": 16, "G": 1, "D": 64, "S": 272},
    {"B": 1, "T": 37, "H": 4, "G": 4, "D": 80, "S": 112},
    {"B": 2, "T": 7, "H": 71, "G": 1, "D": 16, "S": 64},
    {"B": 3, "T": 5, "H": 8, "G": 2, "D": 128, "S": 80},
    {"B": 130, "T": 1, "H": 3, "G": 3, "D": 8, "S": 32},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_attention_is_its_definition(kernel: Kernel, shape: dict[str, int], dtype: torch.dtype) -> None:
    assert_right(kernel, Case(shape, dtype))


@pytest.mark.parametrize("name", runnable())
def test_a_long_cache_that_many_threads_share_is_merged_from_all_its_stretches(name: str) -> None:
    kernel = Kernel(name, 8)  # 40 pieces, of which 16 are merged at a time
    assert_right(kernel, Case({"B": 1, "T": 1, "H": 20, "G": 1, "D": 24, "S": 16384}, torch.float32))
    kernel.library.wh_team_free(kernel.team)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bits_do_not_depend_on_which_thread_is_faster(dtype: torch.dtype) -> None:
    case = Case({"B": 3, "T": 2, "H": 6, "G": 1, "D": 24, "S": 1040}, dtype)
    kernel = Kernel(runnable()[0], 5)
    first = kernel.attend(case, 0)
    for _ in range(50):
        assert torch.equal(kernel.attend(case, 0), first)
    kernel.library.wh_team_free(kernel.team)


@pytest.mark.parametrize(
    "reach", [{"window": 1}, {"window": 9}, {"window": 20, "lead": 3}, {"window": 5, "lead": 30}]
)
@pytest.mark.parametrize("shape", SHAPES[1:6], ids=lambda shape: "-".join(map(str, shape.values())))
def test_windows_and_first_keys_are_all_that_is_read(
    kernel: Kernel, shape: dict[str, int], reach: dict[str, int]
) -> None:
    assert_right(kernel, Case(shape, torch.float32, **reach))


@pytest.mark.parametrize("window", [0, 30])
def test_penalties_grow_with_distance(kernel: Kernel, window: int) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.01, 0.1, 0.0, 1.0])
    assert_right(
        kernel,
        Case(
            {"B": 2, "T": 19, "H": 6, "G": 2, "D": 20, "S": 96}, torch.float32, slopes=slopes, window=window
        ),
    )


@pytest.mark.slow
@given(data=st.data())
def test_any_shape_gives_its_definition(data: st.DataObject) -> None:
    groups, share = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 18))
    shape = {
        "B": data.draw(st.integers(1, 4)),
        "T": data.draw(st.integers(1, 20)),
        "H": groups * share,
        "G": groups,
        "D": data.draw(st.integers(1, 70)),
        "S": 16 * data.draw(st.integers(1, 40)),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    window, lead = data.draw(st.sampled_from([(0, 0), (13, 0), (40, 4)]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kernel = Kernel(runnable()[0], data.draw(st.integers(1, 5)))
    assert_right(kernel, Case(shape, dtype, window=window, lead=lead))
    kernel.library.wh_team_free(kernel.team)


def test_scores_far_apart_do_not_overflow(kernel: Kernel) -> None:
    case = Case({"B": 1, "T": 3, "H": 2, "G": 1, "D": 16, "S": 256}, torch.float32, scale=40.0)
    torch.testing.assert_close(kernel.attend(case, 0).double(), case.expected(0)[0], atol=1e-3, rtol=0)


def test_the_largest_keys_of_a_wide_head_do_not_overflow(kernel: Kernel) -> None:
    case = Case({"B": 1, "T": 2, "H": 2, "G": 1, "D": 1040, "S": 32}, torch.int8, scale=1e-4)
    case.k, case.q = torch.full_like(case.k, 127), torch.ones_like(case.q)
    assert_right(kernel, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_grow_key_by_key_are_right(kernel: Kernel, dtype: torch.dtype) -> None:
    case = Case({"B": 1, "T": 9, "H": 6, "G": 2, "D": 16, "S": 320}, dtype, scale=1.0)
    case.pos = torch.arange(320).int()[None]
    case.q_pos = torch.arange(310, 319).int()[None]
    case.q = torch.ones_like(case.q)
    keys = torch.arange(320).view(20, 1, 16, *[1] * (case.k.dim() - 6)) / 512 - 1
    case.k = keys.expand_as(case.k).contiguous().to(dtype)
    assert_right(kernel, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_query_that_is_no_finite_number_is_seen_in_its_row_and_in_no_other(
    kernel: Kernel, dtype: torch.dtype, wrong: float
) -> None:
    case = Case({"B": 1, "T": 5, "H": 4, "G": 2, "D": 20, "S": 160}, dtype)
    clean = kernel.attend(case, 0)
    case.q[0, 3, 1, 7] = wrong
    y = kernel.attend(case, 0)
    assert y[0, 3, 1].isnan().all()
    y[0, 3, 1] = clean[0, 3, 1]
    assert torch.equal(y, clean)


def test_values_in_empty_slots_are_never_read(kernel: Kernel) -> None:
    case = Case({"B": 2, "T": 4, "H": 6, "G": 2, "D": 20, "S": 96}, torch.float32)
    empty = (case.pos < 0).unflatten(1, (-1, 16))[:, None, None, ..., None]
    case.v = torch.where(empty, 1e30, case.v)
    assert_right(kernel, case)
