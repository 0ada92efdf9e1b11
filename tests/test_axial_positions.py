"""Axial positions: the grid, transformers' numbers, limits."""

import pytest
import torch

from writehead.core.positions import Positions
from writehead.positions.axial import Axial


def test_every_position_has_its_own_vector_made_of_the_axes_tables():
    scheme = Axial(7, shape=[3, 2, 4])
    assert [tuple(t.shape) for t in scheme.tables] == [(3, 3), (2, 2), (4, 2)]
    found = scheme.embed(Positions.range(1, 0, 24), torch.float32)[0]
    a, b, c = scheme.tables
    right = [torch.cat([a[i], b[j], c[k]]) for i in range(3) for j in range(2) for k in range(4)]
    assert torch.equal(found, torch.stack(right))
    assert len(found.unique(dim=0)) == 24


@pytest.mark.slow
def test_the_vectors_are_those_of_transformers():
    modeling = pytest.importorskip(
        "transformers.models.reformer.modeling_reformer", reason="oracle: transformers"
    )
    from transformers import ReformerConfig

    theirs = modeling.AxialPositionEmbeddings(
        ReformerConfig(
            hidden_size=12, axial_pos_shape=(4, 5), axial_pos_embds_dim=(4, 8), max_position_embeddings=20
        )
    ).eval()
    ours = Axial(12, shape=[4, 5], dims=[4, 8])
    for mine, table in zip(ours.tables, theirs.weights, strict=True):
        mine.data.copy_(torch.nn.init.normal_(table.detach()).view_as(mine))
    right = theirs(torch.arange(20)[None])
    assert torch.equal(ours.embed(Positions.range(1, 0, 20), torch.float32), right)


def test_the_position_after_the_grid_raises():
    scheme = Axial(4, shape=[2, 3])
    assert scheme.embed(Positions.range(1, 5, 6), torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="position 6 does not exist: this model has 6 positions"):
        scheme.embed(Positions.range(1, 6, 7), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": [8]}, r"shape=\[8\] must name at least two axes"),
        ({"shape": [8, 0]}, r"shape=\[8, 0\] must name at least two axes of at least 1"),
        (
            {"shape": [2, 2], "dims": [4, 4]},
            r"dims=\[4, 4\] must be 2 widths of 5 together, such as \[3, 2\]",
        ),
        ({"shape": [2, 2], "dims": [5]}, r"dims=\[5\] must be 2 widths"),
    ],
)
def test_grids_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Axial(5, **options)
