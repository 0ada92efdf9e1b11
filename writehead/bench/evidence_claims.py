"""What the evidence's records show of the papers' claims, and whether it holds."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

from writehead.bench.experiments import ACROSS, LENGTH, POSITIONS

Record = Mapping[str, Any]
Rows = Mapping[str, list[Record]]
SHRUNK = ("1 head", "2 heads", "4 heads", "8 thin heads")


@dataclass(frozen=True)
class Scale:
    """What runs are compared in.

    Attributes:
        column: of the results.
        unit: in words.
        within: so much worse than all heads multi-query attention may be.
        logarithm: is the column the logarithm of a perplexity, which is better if it is smaller? Differences
            are then told in per cent of the perplexity.
    """

    column: str
    unit: str
    within: float
    logarithm: bool = False

    def better(self, ours: float, theirs: float) -> float:
        """How much better one result is than another, in the unit."""
        return 100 * (1 - exp(ours - theirs)) if self.logarithm else ours - theirs

    def verdict(self, better: float) -> str:
        """Is multi-query attention near enough to all heads?"""
        word = "holds" if better >= -self.within else "**does not hold**"
        return f"Within {self.within:g} {self.unit}: {word}."


BLEU = Scale("BLEU beam 4", "BLEU", 0.6)
PERPLEXITY = Scale("ln PPL", "% perplexity", 2, logarithm=True)
NATS = Scale("nats", "% perplexity", 2, logarithm=True)


def paired(rows: Rows, a: str, b: str, scale: Scale) -> tuple[float, int] | None:
    """How much better a is than b over the seeds that both have (means), and how many; None without any."""
    scores = [{r["piece"][2]: float(r["results"][scale.column]) for r in rows.get(v, ())} for v in (a, b)]
    seeds = scores[0].keys() & scores[1].keys()
    if not seeds:
        return None
    ours, theirs = (statistics.fmean(each[seed] for seed in seeds) for each in scores)
    return scale.better(ours, theirs), len(seeds)


def _sharing(rows: Rows, scale: Scale) -> list[str]:
    """What head sharing cost against all heads, and gained against shrunk ones."""
    claims, unit = [], scale.unit
    versus = paired(rows, "multi-query", "multi-head", scale)
    if versus is not None:
        better, seeds = versus
        of = f"{seeds} paired seeds" if seeds > 1 else "one seed"
        claims.append(
            f"Multi-query against multi-head (plus is better): {better:+.2f} {unit} (mean of {of}). "
            f"{scale.verdict(better)}"
        )
    beaten = {name: paired(rows, "multi-query", name, scale) for name in SHRUNK}
    known = {name: value for name, value in beaten.items() if value is not None}
    if known:
        words = ", ".join(f"{name} {value[0]:+.2f}" for name, value in known.items())
        ahead = all(value[0] > 0 for value in known.values())
        verdict = "holds" if ahead else "**does not hold**"
        some = "" if len(known) == len(SHRUNK) else f" (of {len(known)} of {len(SHRUNK)} so far)"
        claims.append(
            f"Multi-query against shrunk baselines in {unit} (plus is better): {words}. "
            f"Ahead of every one: {verdict}{some}."
        )
    return claims


def _translation(rows: Rows) -> list[str]:
    claims = _sharing(rows, BLEU) + _sharing(rows, PERPLEXITY)
    for name, base in ACROSS.items():
        for against in (base, "multi-head"):
            gained = {scale: paired(rows, name, against, scale) for scale in (BLEU, PERPLEXITY)}
            words = [f"{found[0]:+.2f} {scale.unit}" for scale, found in gained.items() if found]
            if words:
                claims.append(
                    f"All heads where the decoder reads its source, against {against} (plus is better): "
                    f"{', '.join(words)}."
                )
    first = next(iter(rows.values()))[0]
    return [*claims, f"BLEU: sacreBLEU `{first['signature']}`, {first['scored']} sentences of test 2016."]


def _lm(rows: Rows) -> list[str]:
    return _sharing(rows, NATS)


def _alibi(rows: Rows) -> list[str]:
    """Does perplexity stay at 8 times the training length?"""
    claims = []
    for protocol in ("apart", "sliding"):
        for name in POSITIONS:
            if own := rows.get(name):
                short, long = (
                    statistics.fmean(r["results"][f"{protocol} {LENGTH * times}"] for r in own)
                    for times in (1, 8)
                )
                word = "flat or falling" if long - short < 0.01 else "**rising**"
                claims.append(
                    f"{name}, {protocol}: perplexity at {8 * LENGTH} is {exp(long - short):.2f} times "
                    f"that at {LENGTH}: {word}."
                )
    return claims


CLAIMS: Mapping[str, Callable[[Rows], list[str]]] = {
    "translation": _translation,
    "lm": _lm,
    "alibi": _alibi,
}
