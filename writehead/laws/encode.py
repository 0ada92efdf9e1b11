"""The laws of a bidirectional call: rows and padding."""

import torch

from writehead.laws.subject import Draw, Findings, Subject, Tokens, gap, gapped, leaf_of, nothing, spread


def rows(s: Subject, draw: Draw) -> Findings:
    tokens = leaf_of(draw.tokens(s.length))
    y = s.encode(tokens)
    for row in range(3):
        valid = tokens.valid[row]
        alone = s.encode(tokens.rows([row]))[0]
        yield f"row {row} of three", gap(y[row][valid], alone[valid])
        by = s.gradients((y[row] * draw.normal(*alone.shape))[valid].sum(), {"x": tokens.x})["gradient of x"]
        yield f"gradient of row {row} by other rows", nothing(by[[i for i in range(3) if i != row]])


def padding(s: Subject, draw: Draw) -> Findings:
    tokens = leaf_of(draw.tokens(s.length, ragged=False))
    weight = draw.normal(*tokens.x.shape)
    plain = s.encode(tokens)
    right = s.gradients((plain * weight).sum(), {"x": tokens.x})
    for where, places in gapped(draw, s.length, 5).items():
        leaf = leaf_of(spread(Tokens(tokens.x.detach(), tokens.index), places, s.length + 5, s.garbage))
        y = s.encode(leaf)[torch.arange(3)[:, None], places]
        yield f"outputs beside padding {where}", gap(y, plain)
        found = s.gradients((y * weight).sum(), {"x": leaf.x})
        by = found.pop("gradient of x")
        yield f"gradient by padding {where}", nothing(by[~leaf.valid])
        for what, value in found.items():
            yield f"{what} beside padding {where}", gap(value, right[what])
