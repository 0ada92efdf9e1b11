"""Balancing a matrix in log space until its rows and columns sum to one, whole or row after row."""

import torch
from torch import Tensor

LOW = -1e30  # the logarithm of nothing: finite, so that differences and gradients stay numbers


def balance(scores: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Rows, then columns, alternately, and rows at the end.

    Args:
        scores: (..., N, M) logarithms.
        mask: broadcasts to them; entries outside become 0, and so do rows without any.
        iterations: how many times.

    Returns:
        (..., N, M) weights, each row summing to 1.
    """
    scores = torch.where(mask, scores, LOW)
    for _ in range(iterations):
        scores = torch.where(mask, scores - scores.logsumexp(-1, keepdim=True), LOW)
        scores = torch.where(mask, scores - scores.logsumexp(-2, keepdim=True), LOW)
    scores = scores - scores.logsumexp(-1, keepdim=True)
    return torch.where(mask, scores.exp(), 0)


def next_row(scores: Tensor, columns: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """One more row, balanced against the rows before it only: what follows cannot change it.

    Args:
        scores: (B, G, M) logarithms of the row, of which the first `entries` count.
        columns: (B, iterations, G, M) log-sums of each column over the rows so far, at each iteration.
        entries: row n of a causal matrix has n.

    Returns:
        The row's weights (B, G, M), summing to 1 unless there are no entries, and the columns with it.
    """
    mask = torch.arange(scores.shape[-1], device=scores.device) < entries
    row, after = torch.where(mask, scores, LOW), []
    for old in columns.unbind(1):
        row = torch.where(mask, row - row.logsumexp(-1, keepdim=True), LOW)
        sums = torch.logaddexp(old, row)
        after.append(sums)
        row = torch.where(mask, row - sums, LOW)
    row = row - row.logsumexp(-1, keepdim=True)
    return torch.where(mask, row.exp(), 0), torch.stack(after, 1)
