"""Losses of masked words and of hidden sentences (contrastive predictive coding), number by number."""

import math


def nll(logits: list, target: list) -> float:
    """Negative log-likelihood of one row's guesses in nats; -1 = nothing to guess."""
    total = 0.0
    for scores, wanted in zip(logits, target, strict=True):
        if wanted >= 0:
            total -= scores[wanted] - math.log(sum(math.exp(s) for s in scores))
    return total


def contrast(summaries: list, alone: list) -> float:
    """The mean over sentences n of -log softmax_m(summary_n . alone_m / sqrt X) at m = n."""
    total = 0.0
    for n, summary in enumerate(summaries):
        scores = [
            sum(a * b for a, b in zip(summary, one, strict=True)) / math.sqrt(len(one)) for one in alone
        ]
        total -= scores[n] - math.log(sum(math.exp(s) for s in scores))
    return total / len(summaries)
