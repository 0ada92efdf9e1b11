"""Beam search: the most probable continuations, with a length penalty, for several prompts at once.

Paper     Wu et al. 2016, "Google's Neural Machine Translation System", arXiv:1609.08144 (the length penalty)
Equation  score = log p(text) / penalty(length); length counts the end-of-sequence token
Differs   there are two rules, which differ in more than the penalty (`Options.beam_rule`); candidates are
          twice the beams, or more with several end tokens, so that as many beams survive
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.state import select
from writehead.decode.engine import Engine
from writehead.decode.loop import Cost
from writehead.decode.options import Options
from writehead.decode.prompts import Prompts
from writehead.decode.result import Generation, Timings, Tokenizer, Track


class Link(NamedTuple):
    """The last token of a continuation, and what it continues."""

    before: "Link | None"
    token: int
    logprob: float


class Candidate(NamedTuple):
    """A beam with one more token."""

    total: float  # log-probability of the whole continuation
    beam: int
    link: Link


class Hypotheses:
    """The search for one prompt: beams that grow, and the best texts that ended."""

    def __init__(self, options: Options) -> None:
        """Start with one beam that has said nothing, and as many more that are out of the race."""
        self._options = options
        self.alive: list[Candidate] = []
        self.ended: list[tuple[float, Link]] = []

    def advance(self, length: int, candidates: list[Candidate]) -> None:
        """Take the best candidates, `length` tokens long, in falling order."""
        beams, eos = self._options.num_beams, self._options.eos
        scale = penalty(length, self._options)
        real = [c for c in candidates if c.total > -torch.inf]
        self.alive = [c for c in real if c.link.token not in eos][:beams]
        ends = [c for c in real if c.link.token in eos]
        if self._options.beam_rule == "power":
            cut = length == self._options.max_new_tokens
            ends = [c for c in real[:beams] if cut or c.link.token in eos]
        new = [(c.total / scale, c.link) for c in ends]
        self.ended = sorted(self.ended + new, key=lambda e: -e[0])[:beams]

    def done(self, length: int) -> bool:
        """Is the search over after `length` tokens?"""
        limit, early = self._options.max_new_tokens, self._options.early_stopping
        if not self.alive or length == limit:
            return True
        if len(self.ended) < self._options.num_beams:
            return False
        if early is True:
            return True
        ends = (length,) if early is False else (length + 1, limit)  # the penalty is monotonous in the length
        best = max(self.alive[0].total / penalty(n, self._options) for n in ends)
        return best <= self.ended[-1][0]

    def best(self, length: int) -> list[tuple[float, Link]]:
        """The texts to give back: those that ended, and by the rule "gnmt" then what the limit cut off."""
        if self._options.beam_rule == "power":
            return self.ended[: self._options.num_return_sequences]
        scale = penalty(length, self._options)
        cut = [(c.total / scale, c.link) for c in self.alive]
        return [*self.ended, *cut][: self._options.num_return_sequences]


def search(
    engine: Engine, prompts: Prompts, options: Options, tokenizer: Tokenizer | None, timings: Timings
) -> list[Generation]:
    """The num_return_sequences best continuations of each prompt (fewer only if no more exist), best first.

    Raises:
        ValueError: NaN logits.
    """
    clock, R, B = time.perf_counter(), len(prompts.given), options.num_beams
    logits, state = engine.start(prompts.tokens, prompts.store, prompts.source)
    index = torch.arange(R, device=logits.device).repeat_interleave(B)
    logits, state = logits[index], select(state, index)
    cost = Cost(engine, prompts, timings)
    cost.book(time.perf_counter() - clock, 0)
    clock = time.perf_counter()
    searches = [Hypotheses(options) for _ in range(R)]
    found: dict[int, list[tuple[float, Link]]] = {}
    running = list(range(R))  # the prompt of each group of B rows
    links: list[Link | None] = [None] * (R * B)
    totals = torch.full((R, B), -torch.inf, dtype=_wide(logits), device=logits.device)
    totals[:, 0] = 0
    for length in range(1, options.max_new_tokens + 1):
        candidates = _candidates(logits, totals, links, length, options)
        for prompt, own in zip(running, candidates, strict=True):
            searches[prompt].advance(length, own)
            if searches[prompt].done(length):
                found[prompt] = searches[prompt].best(length)
        groups = [group for group, prompt in enumerate(running) if prompt not in found]
        if not groups:
            break
        running = [running[group] for group in groups]
        rows, kept, links, totals = _next(groups, [searches[prompt].alive for prompt in running], totals, B)
        if rows != list(range(len(logits))):
            state = select(state, torch.tensor(rows, device=logits.device))
        tokens = torch.tensor(kept, dtype=torch.int64, device=logits.device)
        cost.read(len(rows), length)
        logits, state = engine.step(tokens, state)
        cost.book(time.perf_counter() - clock, len(rows))
        clock = time.perf_counter()
    return [
        _generation(prompt, score, link, options, tokenizer, engine.reads_source)
        for prompt in range(R)
        for score, link in found[prompt]
    ]


def penalty(length: int, options: Options) -> float:
    """What a log-probability of so many tokens is divided by."""
    base = length if options.beam_rule == "power" else (5 + length) / 6
    return float(base**options.length_penalty)


def _candidates(
    logits: Tensor, totals: Tensor, links: list[Link | None], length: int, options: Options
) -> list[list[Candidate]]:
    """The best ways to go on, for each prompt in falling order of log-probability."""
    logp = logits.to(_wide(logits)).log_softmax(-1)
    if bool(logp[:, 0].isnan().any()):  # one bad value spoils the normaliser of its row
        raise ValueError(f"row {int(logp[:, 0].isnan().nonzero()[0])}: the model produced NaN or +inf logits")
    if length <= options.min_new_tokens and options.eos:
        logp[:, sorted(options.eos)] = -torch.inf
    (groups, B), V = totals.shape, logp.shape[1]
    logp = logp.view(groups, B * V)
    after = (totals[..., None] + logp.view(groups, B, V)).view(groups, B * V)
    most = min(B * max(2, 1 + len(options.eos)), B * V)
    best, at = after.topk(most)
    own = logp.gather(1, at)
    return [
        [
            Candidate(total, flat // V, Link(links[group * B + flat // V], flat % V, logprob))
            for total, flat, logprob in zip(*row, strict=True)
        ]
        for group, row in enumerate(zip(best.tolist(), at.tolist(), own.tolist(), strict=True))
    ]


def _next(
    groups: list[int], alive: list[list[Candidate]], totals: Tensor, B: int
) -> tuple[list[int], list[int], list[Link | None], Tensor]:
    """For each beam that goes on: the row it comes from, its token, its link, its log-probability."""
    rows, tokens, links, sums = list[int](), list[int](), list[Link | None](), list[float]()
    for group, beams in zip(groups, alive, strict=True):
        # Fewer ways to go on than beams: the rest repeats the first one out of the race.
        filled = beams + [beams[0]._replace(total=-torch.inf)] * (B - len(beams))
        rows += [group * B + c.beam for c in filled]
        tokens += [c.link.token for c in filled]
        links += [c.link for c in filled]
        sums += [c.total for c in filled]
    return rows, tokens, links, totals.new_tensor(sums).view(-1, B)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _generation(
    prompt: int, score: float, last: Link, options: Options, tokenizer: Tokenizer | None, begins: bool
) -> Generation:
    chain, link = list[Link](), last
    while True:
        chain.append(link)
        if link.before is None:
            break
        link = link.before
    track = Track(prompt, prompt, options, tokenizer, begins)
    for link in reversed(chain):
        track.accept(link.token, link.logprob)
    track.generation.score = score
    return track.generation
