"""The products of the native engine against PyTorch: every format, instruction set, ragged shape and row count."""

import ctypes
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_twins import product, quantised
from torch import Tensor

from writehead.native.build import FOLDER
from writehead.native.formats import STEPS, Packed, pack, unpack
from writehead.native.library import load, runnable
from writehead.native.structs import FORMATS, Matrix

SETS = runnable()
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 24, 25, 37, 64, 129, 130)
SHAPES = ((1, 1), (16, 32), (17, 33), (48, 64), (100, 300), (33, 575))
ROUNDING = 2.0**-21  # of the sum of magnitudes: float32 sums of up to a thousand products


class Engine:
    """A library and a team of two threads."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"libwritehead_{name}.so"
        if not path.exists():
            pytest.skip(f"{path.name} was not built; run python -m writehead.native.build")
        self.library = load(path)
        self.team = self.library.wh_team_create(2)

    def linear(self, matrix: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x times the matrix; the result is surrounded by numbers that must stay as they are."""
        around = torch.full((len(x) * matrix.n + 32,), 7.0)
        y = around[16:-16]
        struct = Matrix(
            FORMATS.index(matrix.format),
            matrix.n,
            matrix.k,
            matrix.data.data_ptr(),
            None if matrix.scales is None else matrix.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        x = x.contiguous()
        done = self.library.wh_linear(
            self.team, ctypes.byref(struct), x.data_ptr(), len(x), around.data_ptr() + 64
        )
        assert done == 0
        assert (around[:16] == 7).all()
        assert (around[-16:] == 7).all()
        return y.view(len(x), matrix.n)


@pytest.fixture(scope="module", params=SETS)
def engine(request):
    engine = Engine(request.param)
    yield engine
    engine.library.wh_team_free(engine.team)


def magnitudes(matrix: Packed) -> Tensor:
    """What is added up to a weight, without signs: of an int4 weight the step times its value, and the least."""
    weight = unpack(matrix, torch.float64)
    if matrix.format != "int4":
        return weight.abs()
    least = matrix.scales[:, :, 1].double().transpose(1, 2).flatten(0, 1).repeat_interleave(32, 1)
    least = least[: matrix.n, : matrix.k]
    return (weight - least).abs() + least.abs()


def check(engine: Engine, matrix: Packed, x: Tensor, bias: Tensor | None = None) -> None:
    """The kernel's deviation is that of float32 sums, relative to the sum of the products' magnitudes."""
    got = engine.linear(matrix, x, bias).double()
    inputs = quantised(x) if matrix.format in STEPS else x.double()
    size = inputs.abs() @ magnitudes(matrix).T + (0 if bias is None else bias.abs())
    assert ((got - product(matrix, x, bias)).abs() <= ROUNDING * size + 1e-30).all()


def test_a_library_says_which_instructions_it_uses(engine, request):
    assert engine.library.wh_instructions().decode() == request.node.callspec.params["engine"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_products_are_those_of_the_twin_at_every_row_count(engine, format, shape):
    matrix, bias = pack(torch.randn(shape), format), torch.randn(shape[0])
    for rows in ROWS:
        check(engine, matrix, torch.randn(rows, shape[1]), bias)


@pytest.mark.parametrize("format", FORMATS)
@given(rows=st.integers(1, 130), n=st.integers(1, 90), k=st.integers(1, 400), seed=st.integers(0, 9))
def test_products_of_any_shape_are_those_of_the_twin(engine, format, rows, n, k, seed):
    torch.manual_seed(seed)
    check(engine, pack(torch.randn(n, k), format), torch.randn(rows, k) * 10 ** torch.randn(rows, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_long_rows_of_weights_cross_every_panel(engine, format):
    matrix = pack(torch.randn(40, 1100), format)
    for rows in (1, 13, 30):
        check(engine, matrix, torch.randn(rows, 1100))


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_are_cut_into_blocks_that_meet(engine, format):
    matrix, bias = pack(torch.randn(230, 130), format), torch.randn(230)
    for rows in (191, 192, 330):
        check(engine, matrix, torch.randn(rows, 130), bias)


@pytest.mark.parametrize("format", FORMATS)
def test_no_row_gives_no_output(engine, format):
    assert engine.linear(pack(torch.randn(20, 40), format), torch.empty(0, 40)).shape == (0, 20)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("size", [2.0**-16, 2.0**-22, 1e3], ids=("subnormal", "tiny", "large"))
def test_group_scales_may_be_subnormal_or_large(engine, format, size):
    matrix = pack(torch.randn(20, 70) * size, format)
    assert matrix.format in (format, "bfloat16")
    check(engine, matrix, torch.randn(3, 70))


def extremes(format: str, value: int) -> Packed:
    """A matrix whose every integer is `value`, as files may hold it though `pack` writes none such."""
    matrix = pack(torch.randn(16, 64), format)
    byte = value | value << 4 if format == "int4" else value
    return Packed(format, 16, 64, torch.full_like(matrix.data, byte), matrix.scales)


@pytest.mark.parametrize(("format", "value"), [("int8", 0), ("int8", 255), ("int4", 0), ("int4", 15)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_do_not_overflow(engine, format, value, sign):
    check(engine, extremes(format, value), torch.full((7, 64), 3.0 * sign))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_not_finite_is_seen_in_its_row_and_in_no_other(engine, format, bad):
    matrix, x = pack(torch.randn(20, 64).abs() + 1, format), torch.randn(5, 64)
    clean = engine.linear(matrix, x)
    x[3, 40] = bad
    y = engine.linear(matrix, x)
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_give_the_bias(engine, format):
    bias = torch.randn(20)
    y = engine.linear(pack(torch.randn(20, 64), format), torch.zeros(3, 64), bias)
    assert torch.equal(y, bias.expand(3, -1))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_bit(engine, threads):
    matrix, x = pack(torch.randn(300, 200), "int8"), torch.randn(9, 200)
    expected = engine.linear(matrix, x)
    other = Engine(engine.library.wh_instructions().decode())
    other.team = other.library.wh_team_create(threads)
    for _ in range(20):
        assert torch.equal(other.linear(matrix, x), expected)
    other.library.wh_team_free(other.team)


FORK = """
import ctypes, os, sys
from pathlib import Path
from writehead.native.library import load
from writehead.native.structs import Matrix
library = load(Path(sys.argv[1]))
team = library.wh_team_create(3)
w, x, y = (ctypes.c_float * (64 * 32))(*[1.0] * 2048), (ctypes.c_float * 32)(*[2.0] * 32), (ctypes.c_float * 64)()
matrix = Matrix(0, 64, 32, ctypes.addressof(w), None, None)
def product():
    ctypes.memset(y, 0, 256)
    library.wh_linear(team, ctypes.byref(matrix), ctypes.byref(x), 1, ctypes.byref(y))
    return list(y) == [64.0] * 64
before, child = product(), os.fork()
if child == 0:
    right = product()
    library.wh_team_free(team)
    os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if before and product() and os.waitstatus_to_exitcode(status) == 0 else 1)
"""


@pytest.mark.slow
def test_a_team_still_works_in_a_process_that_was_forked(engine):
    path = FOLDER / f"libwritehead_{engine.library.wh_instructions().decode()}.so"
    run = subprocess.run(
        [sys.executable, "-c", FORK, str(path)], cwd=FOLDER.parents[1], timeout=60, capture_output=True
    )
    assert run.returncode == 0, run.stderr
