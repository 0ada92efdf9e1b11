"""What attention through features costs and how well it estimates softmax; run as
`python -m writehead.bench.feature_maps PART --out FOLDER`.

Parts: "estimate" (error against the number of features), "peers" (forward and backward beside other PyTorch
code), "slopes" (time and memory against length), "decode" (one token behind longer and longer pasts),
"crossover" (the length from which each is faster than dense attention).
"""

import argparse
import importlib.util
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from writehead.bench.measure import Case, Timing, alternate, write_record
from writehead.bench.plots import INK, _pyplot, _save
from writehead.catalog import MIXERS, build
from writehead.core.cache import Store
from writehead.core.positions import Positions
from writehead.core.state import detach
from writehead.ops.features import directions
from writehead.ops.scan import Rule, empty, scan

KINDS = ("linear", "performer", "rfa", "rfa_gate")
FEATURES = {"performer": {"features": 64}, "rfa": {"features": 32}, "rfa_gate": {"features": 32}}
DENSE_PAST = 16384  # tokens; filling a longer cache takes dense attention too long
SUM = Rule(1e-10, floor=False)


def estimate(counts: Sequence[int] = (8, 16, 32, 64, 128, 256, 512), seeds: int = 40) -> dict[str, Any]:
    """Error of attention estimated by random features, against softmax attention.

    Values are normal, queries and keys normal of standard deviation 1/2 (T = 32, D = 16); the error is
    |y' - y|^2 / |y|^2, averaged over seeds.

    Args:
        counts: features M; waves and hyperbolic ones make two of each direction.
        seeds: draws of inputs and directions.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in ("positive", "hyperbolic", "waves"):
        for draw in ("independent", "orthogonal"):
            line = found.setdefault(f"{kind}, {draw}", {})
            for M in counts:
                line[str(M)] = math.fsum(_error(kind, draw, M, seed) for seed in range(seeds)) / seeds
    return found


def _error(kind: str, draw: str, M: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 32, 16, generator=generator, dtype=torch.float64).unbind()
    q, k = q / 4, k / 4  # x' = D^-1/4 x for x half as large
    right = torch.softmax(q @ k.T, -1) @ v
    W = directions(M if kind == "positive" else M // 2, 16, draw, generator)

    def features(x: Tensor) -> Tensor:
        p, half = x @ W.T, x.square().sum(-1, keepdim=True) / 2
        if kind == "waves":
            return torch.cat([p.sin(), p.cos()], -1) * half.exp()
        return torch.exp((torch.cat([p, -p], -1) if kind == "hyperbolic" else p) - half)

    weights = features(q) @ features(k).T
    y = weights @ v / weights.sum(-1, keepdim=True)
    return float((y - right).square().sum() / right.square().sum())


def estimate_plot(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Error against features, both logarithmic; dashed: independent draws."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for i, (name, line) in enumerate(found.items()):
        dash = "--" if name.endswith("independent") else "-"
        axis.loglog([int(m) for m in line], list(line.values()), dash, color=INK[i // 2], label=name)
    axis.set_xlabel("features M")
    axis.set_ylabel("error of attention, |y' - y|² / |y|²")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def peers(tokens: int = 16384, rounds: int = 3) -> dict[str, Any]:
    """Forward and backward of causal linear attention from features on, the same tensors, in turns.

    Beside ours: flash-linear-attention's PyTorch chunk form and performer-pytorch's, where installed.

    Args:
        tokens: T; 8 heads of 64.
        rounds: samples of each.
    """
    q, k = (torch.rand(1, tokens, 8, 64).requires_grad_() for _ in range(2))
    v = torch.randn(1, tokens, 8, 64).requires_grad_()
    weight = torch.randn(1, tokens, 8, 64)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scan(q, k, v, empty(1, 8, 64, 64, q), SUM)[0]

    def both(function: Callable[..., Tensor]) -> Case:
        return lambda: _drop(torch.autograd.grad(function(q, k, v), (q, k, v), weight))

    forms = {"ours": ours} | _peers()
    right = ours(q.detach(), k.detach(), v.detach())
    gaps = {name: float((form(q, k, v).detach() - right).abs().max()) for name, form in forms.items()}
    timings = alternate(
        {name: both(form) for name, form in forms.items()}, rounds, min_seconds=0.1, max_rounds=rounds
    )
    return {"tokens": tokens, "seconds": timings, "largest difference from ours": gaps}


def _peers() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
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
        noncuda = importlib.import_module(
            "performer_pytorch.performer_pytorch"
        ).causal_linear_attention_noncuda

        def performer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y: Tensor = noncuda(*(t.transpose(1, 2) for t in (q, k, v)))
            return y.transpose(1, 2)

        found[f"performer-pytorch {version('performer-pytorch')}"] = performer
    except (PackageNotFoundError, ImportError):
        pass
    return found


def _drop(value: object) -> None:
    del value


def slopes(
    kinds: Sequence[str] = KINDS, lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536), rounds: int = 2
) -> dict[str, Any]:
    """Time and peak memory of forward and backward against length, with the exponents fitted.

    Args:
        kinds: rows of the catalog.
        lengths: tokens T, at dim 64, one head, 64 features.
        rounds: samples of each.
    """
    found: dict[str, Any] = {}
    for kind in kinds:
        mixer = _mixer(kind, 64, 1)
        steps = {str(T): partial(_train, mixer, T) for T in lengths}
        memory = {name: _peak(step) for name, step in steps.items()}
        timings = alternate(steps, rounds, warmup=0, min_seconds=0.1, max_rounds=rounds)
        times = [min(timings[str(T)].samples) for T in lengths]
        found[kind] = {
            "seconds": timings,
            "peak_bytes": memory,
            "time_exponent": exponent(lengths, times),
            "memory_exponent": exponent(lengths, list(memory.values())),
        }
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p that fits y = c x^p best, in logarithms."""
    a, b = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    cross = math.fsum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return cross / math.fsum((p - mean_a) ** 2 for p in a)


def decode(
    kinds: Sequence[str] = (*KINDS, "mha", "mqa"),
    pasts: Sequence[int] = (1024, 4096, 16384, 65536),
    rounds: int = 5,
) -> dict[str, Any]:
    """Seconds of one token behind pasts of given lengths, each mixer's lengths in turns.

    Args:
        kinds: rows of the catalog.
        pasts: tokens in the state, at dim 512, 8 heads.
        rounds: samples of each.
    """
    found = {}
    for kind in kinds:
        mixer = _mixer(kind, 512, 8)
        with torch.inference_mode():
            far = [past for past in pasts if past <= DENSE_PAST or hasattr(mixer, "features")]
            cases = {str(past): _token(mixer, past) for past in far}
            found[kind] = alternate(cases, rounds, min_seconds=0.05, max_rounds=rounds)
    return found


def _token(mixer: nn.Module, past: int) -> Case:
    run, x = mixer.bind(), torch.randn(1, past, 512)  # type: ignore[operator]
    state = mixer.init_state(1, x, Store(capacity=past + 4096))  # type: ignore[operator]
    for first in range(0, past, 4096):
        pos = Positions.range(1, first, min(first + 4096, past))
        _, state, _ = run(x[:, first : first + 4096], pos, state)
    held, at, token = [state], [past], torch.randn(1, 1, 512)

    def step() -> None:
        at[0] += 1 if at[0] < past + 4095 else 0  # a full cache writes its last slot again
        _, held[0], _ = run(token, Positions.range(1, at[0] - 1, at[0]), held[0])

    return step


def crossover(lengths: Sequence[int] = (256, 512, 1024, 2048, 4096), rounds: int = 2) -> dict[str, Any]:
    """Seconds of forward and backward beside dense attention, and the first length that is faster.

    Args:
        lengths: tokens T, at dim 512, 8 heads.
        rounds: samples of each.
    """
    table: dict[str, dict[str, Timing]] = {kind: {} for kind in ("mha", *KINDS)}
    mixers = {kind: _mixer(kind, 512, 8) for kind in table}
    for T in lengths:
        cases = {kind: partial(_train, mixer, T) for kind, mixer in mixers.items()}
        for kind, timing in alternate(cases, rounds, min_seconds=0.05, max_rounds=rounds).items():
            table[kind][str(T)] = timing
    faster = {kind: first_faster(table[kind], table["mha"]) for kind in KINDS}
    return {"seconds": table, "faster_from": faster}


def first_faster(times: Mapping[str, Timing], dense: Mapping[str, Timing]) -> int | None:
    """The least length from which on every median is below that of dense attention; None = never."""
    found = None
    for length in sorted(map(int, times), reverse=True):
        if not times[str(length)].median < dense[str(length)].median:
            break
        found = length
    return found


def _mixer(kind: str, dim: int, heads: int) -> nn.Module:
    torch.manual_seed(0)
    mixer: nn.Module = build(MIXERS, {"name": kind, "heads": heads, **FEATURES.get(kind, {})}, dim=dim)
    return mixer


def _train(mixer: nn.Module, tokens: int) -> None:
    x = torch.ones(1, tokens, mixer.out.in_features, requires_grad=True)  # type: ignore[union-attr, arg-type]
    y, state, _ = mixer(x, Positions.range(1, 0, tokens))
    detach(state)
    torch.autograd.grad(y.sum(), (x, *mixer.parameters()))


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._count(given, old=True)
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            self._count(made)
        return result

    def _count(self, value: object, old: bool = False) -> None:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self.known:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, 0 if old else storage.nbytes()
        self.known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _peak(step: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds at once, besides those that were there before."""
    counted = _Live()
    with counted:
        step()
    return counted.peak


PARTS: Mapping[str, Callable[..., Any]] = {
    "estimate": estimate, "peers": peers, "slopes": slopes, "decode": decode, "crossover": crossover,
}  # fmt: skip
OPTIONS = {"peers": "tokens", "slopes": "kinds", "decode": "kinds"}


def main() -> None:
    """Measure one part and write its record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tokens", type=int, help="peers only: length")
    parser.add_argument("--kinds", nargs="+", help="slopes and decode only: rows of the catalog")
    given = parser.parse_args()
    options = {key: value for key in ("tokens", "kinds") if (value := getattr(given, key)) is not None}
    for key in options:
        if OPTIONS.get(given.part) != key:
            parser.error(f"--{key} is not an option of the part {given.part}")
    torch.manual_seed(0)
    found = PARTS[given.part](**options)
    name = "-".join([given.part, *(str(v) if key == "tokens" else "-".join(v) for key, v in options.items())])
    write_record(given.out / f"kernels-{name}.json", f"kernels {given.part}", found, options, seed=0)
    if given.part == "estimate":
        estimate_plot(found, given.out / "kernels-estimate.png")


if __name__ == "__main__":
    main()
