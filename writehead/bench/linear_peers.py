"""Forward and backward of causal linear attention beside other people's code, from features on.

Beside ours: fast-transformers' algorithm (its package does not build here in reasonable time, so its product
is written anew in `causal_product.cpp`, and named so), flash-linear-attention's PyTorch chunk form and
performer-pytorch's, the latter two where installed.
"""

import ctypes
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writehead.bench.measure import Case, alternate
from writehead.native.build import compiler
from writehead.ops.scan import empty, scan
from writehead.ops.scan_chunks import Rule

SUM = Rule(1e-10, floor=False)
SOURCE = Path(__file__).parent / "causal_product.cpp"
# not -ffast-math: a library made with it turns small numbers to 0 in the whole process that loads it
REORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", *REORDER, "-fopenmp", "-fPIC", "-shared")


def peers(tokens: int, rounds: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure in turns, on the same tensors.

    Args:
        tokens: T; 8 heads of 64.
        rounds: samples of each.
        say: told what happens.
    """
    q, k = (torch.rand(1, tokens, 8, 64).requires_grad_() for _ in range(2))
    v = torch.randn(1, tokens, 8, 64).requires_grad_()
    weight = torch.randn(1, tokens, 8, 64)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scan(q, k, v, empty(1, 8, 64, 64, q), SUM)[0]

    def both(function: Callable[..., Tensor]) -> Case:
        def run() -> None:
            torch.autograd.grad(function(q, k, v), (q, k, v), weight)

        return run

    with tempfile.TemporaryDirectory(prefix="writehead-peers-") as folder:
        say("compiling")
        forms = {"ours": ours} | found_forms(Path(folder))
        right = ours(q.detach(), k.detach(), v.detach())
        gaps = {name: _gap(form, q.detach(), k.detach(), v.detach(), right) for name, form in forms.items()}
        timings = alternate(
            {name: both(form) for name, form in forms.items()},
            rounds,
            warmup=0,
            min_seconds=0.1,
            max_rounds=rounds,
            progress=lambda name, index, _: say(f"{name}, round {index + 1}"),
        )
    return {"tokens": tokens, "seconds": timings, "largest difference from ours": gaps}


def _gap(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, right: Tensor) -> float:
    return float((form(q, k, v) - right).abs().max())


def found_forms(folder: Path) -> dict[str, Callable[..., Tensor]]:
    """The forms of others that can run here; the compiled one goes into `folder`."""
    found: dict[str, Callable[..., Tensor]] = {}
    if compiled := token_loop(folder):
        found["fast-transformers' algorithm, written anew"] = compiled
    try:
        # the package itself needs triton; this file does not
        path = distribution("fla-core").locate_file("fla/ops/linear_attn/naive.py")
        spec = importlib.util.spec_from_file_location("fla_naive", str(path))
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            chunked = partial(module.naive_chunk_linear_attn, scale=1.0, normalize=True)
            found[f"fla-core {version('fla-core')}"] = chunked
    except (PackageNotFoundError, ImportError):
        pass
    try:
        module = importlib.import_module("performer_pytorch.performer_pytorch")
        found[f"performer-pytorch {version('performer-pytorch')}"] = partial(
            _heads_first, module.causal_linear_attention_noncuda
        )
    except (PackageNotFoundError, ImportError):
        pass
    return found


def _heads_first(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y: Tensor = function(*(t.transpose(1, 2) for t in (q, k, v)))
    return y.transpose(1, 2)


def token_loop(folder: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Causal linear attention with the product of `causal_product.cpp`; None without a compiler."""
    path, chosen = folder / "causal_product.so", compiler()
    if chosen is None:
        return None
    done = subprocess.run([chosen, *FLAGS, str(SOURCE), "-o", str(path)], capture_output=True, check=False)
    if done.returncode:
        return None
    library = ctypes.CDLL(str(path))

    class Product(torch.autograd.Function):
        """sum_{s <= t} (q_t . k_s) v_s, all (B, H, T, width) and contiguous."""

        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            y = torch.empty_like(v)
            _call(library.causal_forward, (q, k, v, y))
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            q, k, v = ctx.saved_tensors
            found = tuple(torch.empty_like(t) for t in (q, k, v))
            _call(library.causal_backward, (q, k, v, grads[0].contiguous(), *found))
            return found

    product: Callable[..., Tensor] = Product.apply

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sums = product(*(t.transpose(1, 2).contiguous() for t in (q, k, v))).transpose(1, 2)
        total = torch.einsum("bthm,bthm->bth", q, k.cumsum(1)) + SUM.eps
        return sums / total[..., None]

    return attend


def _call(function: Any, tensors: tuple[Tensor, ...]) -> None:
    (B, H, T, M), E = tensors[0].shape, tensors[2].shape[3]
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    function(*pointers, *(ctypes.c_int64(n) for n in (B * H, T, M, E)))
