"""Pictures of who sees whom, and curves of position schemes: what is drawn is what the built part does."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from writehead.catalog import MIXERS, build
from writehead.cli import app, curves
from writehead.cli.picture import LONGEST, Picture, draw, look, png, probe
from writehead.core.pattern import Causal, Leading, PerHead, Window
from writehead.core.positions import Positions
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import slopes

run = CliRunner().invoke
PER_HEAD = {"name": "per_head", "patterns": [{"name": "causal"}, {"name": "window", "window": 3}]}


class Liar(nn.Module):
    """Says that it reads a window of three tokens, and reads all."""

    pattern = Window(3)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = Softmax(dim, heads=1, pattern=Causal())

    def init_state(self, *arguments: Any) -> Any:
        return self.inner.init_state(*arguments)

    def forward(self, x: Tensor, pos: Positions, state: Any = None) -> Any:
        return self.inner(x, pos, state)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_sees_what_its_pattern_says(name: str) -> None:
    picture = probe({"name": name, "heads": 4}, 40)
    if name == "cross":
        assert picture.stated is None
        assert bool(picture.seen.all())
        return
    index = torch.arange(40)[None]
    mixer = build(MIXERS, {"name": name, "heads": 4}, dim=8)
    if MIXERS[name].family == "kernel":  # all that came before, until a gate has forgotten it
        early = index[:, :20]
        assert torch.equal(picture.seen[:, :20, :20], Causal().mask(early, early)[0].expand(4, -1, -1))
        assert not picture.seen.triu(1).any()
        return
    pattern = mixer.pattern_for(40) if hasattr(mixer, "pattern_for") else getattr(mixer, "pattern", None)
    if pattern is None:
        assert picture.stated is None
        assert bool(picture.seen.diagonal(dim1=1, dim2=2).any())
        assert bool(picture.seen.triu(1).any()) == (MIXERS[name].decodes == "encode")
        return
    assert picture.seen.shape == (4, 40, 40)
    read = pattern.mask(index, index)[0].expand(4, -1, -1)
    own = torch.eye(40, dtype=torch.bool) & (read.sum(-1, keepdim=True) > 1)  # through the query
    assert torch.equal(picture.seen, read | own)
    assert picture.wrong == 0


def test_what_is_seen_is_what_changes_the_output_when_it_changes() -> None:
    pattern = Causal() & (Window(4) | Leading(2))
    torch.manual_seed(0)
    mixer = Softmax(8, heads=2, pattern=pattern).double()
    x, pos = torch.randn(1, 11, 8, dtype=torch.float64), Positions.range(1, 0, 11)
    changed = torch.zeros(11, 11, dtype=torch.bool)
    with torch.no_grad():
        before = mixer(x, pos)[0]
        for s in range(11):
            other = x.clone()
            other[0, s] += 1
            changed[:, s] = (mixer(other, pos)[0] != before)[0].any(-1)
    assert torch.equal(look(mixer, 11, 8, 2).seen.any(0), changed)


def test_heads_that_differ_are_told_apart_and_grouped() -> None:
    spec = {"name": "mqa", "heads": 4, "pattern": {**PER_HEAD, "patterns": PER_HEAD["patterns"] * 2}}
    picture = probe(spec, 9)
    names = [name for name, _ in picture.planes()]
    assert names == ["heads 0, 2", "heads 1, 3"]
    assert picture.stated is not None
    assert picture.wrong == 0
    assert picture.pattern == str(PerHead((Causal(), Window(3), Causal(), Window(3))))


def test_a_mixer_that_reads_more_than_it_states_is_caught() -> None:
    picture = look(Liar(8), 10, 8)
    assert picture.wrong == 55 - (1 + 2 + 8 * 3)
    assert torch.equal(picture.seen[0], torch.ones(10, 10).tril().bool())
    lines = [line.plain for line in draw(picture, 80, ascii_only=True)]
    assert lines[5] == "xxx###...."
    assert [line.plain for line in draw(picture, 80, ascii_only=False)][4] == "xxxxxxx██▄"


def test_two_rows_share_a_line_of_blocks() -> None:
    lines = [line.plain for line in draw(probe({"name": "mha"}, 5), 80, ascii_only=False)]
    assert lines == ["all heads", "█▄   ", "███▄ ", "▀▀▀▀▀"]


def test_a_picture_wider_than_the_terminal_is_reduced_and_says_so() -> None:
    lines = [line.plain for line in draw(probe({"name": "mha"}, 40), 20, ascii_only=True)]
    assert lines[0] == "all heads (a cell is 2 x 2 tokens)"
    assert lines[1:4] == ["#" + "." * 19, "##" + "." * 18, "###" + "." * 17]
    assert max(map(len, lines[1:])) == 20


def red(data: bytes) -> int:
    from matplotlib.image import imread

    r, g, b = imread(io.BytesIO(data), format="png")[..., :3].transpose(2, 0, 1)
    return int(((abs(r - 0.85) < 0.01) & (abs(g - 0.15) < 0.01) & (abs(b - 0.15) < 0.01)).sum())


@pytest.mark.slow
def test_the_png_marks_what_contradicts_the_pattern_in_red() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    honest, lying = (png(picture, "x") for picture in (probe({"name": "mha"}, 10), look(Liar(8), 10, 8)))
    assert red(honest) == 0
    assert red(lying) > 1000


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_a_length_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a picture holds 1 to {LONGEST} tokens; got {length}"):
        probe({"name": "mha"}, length)


def test_the_curve_of_alibi_is_minus_slope_times_distance() -> None:
    _, found = curves.curves({"name": "alibi"}, 12, heads=4, head_dim=8)
    for head, slope in enumerate(slopes(4)):
        assert found[head].label == f"head {head}"
        assert found[head].values == pytest.approx([-slope * d for d in range(12)])


def test_the_curve_of_rotary_is_the_mean_cosine_of_its_angles() -> None:
    _, [curve] = curves.curves({"name": "rotary"}, 12, heads=2, head_dim=8)
    angles = [10000 ** (-i / 4) for i in range(4)]
    assert curve.values == pytest.approx([sum(math.cos(d * w) for w in angles) / 4 for d in range(12)])


def test_the_curve_of_sinusoidal_positions_is_the_likeness_of_their_vectors() -> None:
    for name in ("sinusoidal", "infused"):
        _, [curve] = curves.curves({"name": name}, 12, heads=2, head_dim=8)
        angles = [10000 ** (-i / 8) for i in range(8)]
        expected = [sum(math.cos(d * w) for w in angles) / 8 for d in range(12)]
        assert curve.values == pytest.approx(expected, abs=1e-5)


def test_no_positions_have_no_curve() -> None:
    says, found = curves.curves({"name": "none"}, 12, heads=2, head_dim=8)
    assert found == []
    assert says.startswith("changes nothing")


def test_curves_are_drawn_to_one_scale() -> None:
    lines = curves.draw([curves.Curve("a", [0, -7]), curves.Curve("b", [0, -1])], 80, ascii_only=True)
    assert [line.plain for line in lines] == ["a       @_  0 .. -7", "b       @%  0 .. -1"]


def test_a_curve_of_one_token_or_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="a curve needs 2 to 8192 tokens; got 1"):
        curves.curves({"name": "rotary"}, 1, 2, 8)
    with pytest.raises(ValueError, match="position 11 does not exist: this model has 5 positions"):
        curves.curves({"name": "learned", "max_context": 5}, 12, 2, 8)


def test_show_prints_card_arguments_costs_and_picture() -> None:
    done = run(
        app, ["show", "local_mqa", "--set", "pattern.window=5", "--context", "12"], env={"COLUMNS": "60"}
    )
    assert done.exit_code == 0
    assert "arXiv:1911.02150" in done.stdout
    assert "kv_heads = 1" in done.stdout
    assert "equal to the pattern Window(window=5, after=0) in every" in done.stdout
    assert "  ▀████▄    \n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_show_counts_the_state_at_three_contexts() -> None:
    found = json.loads(run(app, ["show", "mqa", "--json"]).stdout)
    assert [at["context"] for at in found["figures"]["at"]] == [1024, 8192, 65536]
    for at in found["figures"]["at"]:
        S = at["context"]
        assert at["state_bytes_float32"] == S * (2 * 64 * 4 + 8)
        assert at["state_bytes_bfloat16"] == S * (2 * 64 * 2 + 8)
        assert at["state_read_bfloat16"] == S * 2 * 64 * 2
        assert at["flops"] == 2 * (512 * (512 + 128) + 512 * 512) + 2 * 2 * 8 * 64 * (S + 1)
    assert found["sees"]["differing_pairs"] == 0
    assert found["sees"]["heads"][7][2] == "111" + "0" * 45
    assert found["card"]["State"].startswith("keys and values")


def test_show_explains_what_reads_a_source_and_what_reads_both_ways() -> None:
    cross = json.loads(run(app, ["show", "cross", "--context", "3", "--json"]).stdout)
    assert cross["figures"]["of"] == "one token that reads a source of"
    assert cross["figures"]["at"][0]["state_bytes_float32"] == 1024 * (2 * 512 * 4 + 1) + 8
    assert cross["sees"] == {"heads": [["111"] * 3] * 8, "pattern": None, "differing_pairs": None}
    both = json.loads(run(app, ["show", "bidirectional", "--context", "3", "--json"]).stdout)
    assert both["figures"]["at"][0]["flops"] == 1024 * 2 * 4 * 512**2 + 1024**2 * 4 * 512
    assert both["figures"]["at"][0]["state_bytes_float32"] == 0


@pytest.mark.parametrize("name", ["rotary", "alibi", "t5", "none", "dense", "chunked", "residual"])
def test_show_explains_parts_that_mix_no_tokens(name: str) -> None:
    done = run(app, ["show", name])
    assert done.exit_code == 0
    assert "Paper" in done.stdout
    assert ("Positions: " in done.stdout) == (name in ("rotary", "alibi", "t5", "none"))


def test_show_says_which_argument_it_needs_for_a_picture() -> None:
    assert "Costs and pictures need --set max_context=VALUE." in run(app, ["show", "learned"]).stdout
    assert "cosine " in run(app, ["show", "learned", "--set", "max_context=100"]).stdout


@pytest.mark.slow
def test_show_writes_a_png_and_leaves_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    for name in ("mqa", "alibi"):
        done = run(app, ["show", name, "--png", str(tmp_path / f"{name}.png")])
        assert done.stdout.endswith(f"wrote {tmp_path / f'{name}.png'}\n")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alibi.png", "mqa.png"]


def test_a_png_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(app, ["show", "mqa", "--png", str(tmp_path / "x.png")])
    assert (done.exit_code, done.stderr) == (
        1,
        "error: a PNG needs matplotlib: pip install 'writehead[plot]'\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mqqa"], 1, "unknown system 'mqqa'; did you mean 'mqa'? (`writehead systems` lists all "),
        (["mqa", "--set", "hedas=6"], 1, "mqa takes no argument 'hedas'; did you mean 'heads'?"),
        (["mqa", "--set", "heads=x"], 1, "mqa: heads must be int; got 'x'"),
        (["mqa", "--set", "heads"], 2, "--set takes KEY=VALUE, such as heads=4; got 'heads'"),
        (["mqa", "--set", "heads=4", "--set", "heads.x=4"], 2, "goes below 'heads', which is already set"),
        (["dense", "--set", "gate=true"], 1, "dense takes no argument 'gate'; did you mean 'gated'?"),
        (["dense", "--png", "x.png"], 1, "dense is a part without a picture; leave out --png"),
        (["mqa", "--png", "/no/such/x.png"], 1, "/no/such: there is no such folder to write into"),
        (["mqa", "--context", "600"], 1, "a picture holds 1 to 512 tokens; got 600"),
    ],
)
def test_show_refuses_in_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run(app, ["show", *arguments])
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_values_of_set_are_json_or_words() -> None:
    from writehead.cli.cards import settings

    given = ["a=1", "b=1.5", "c=true", "d=None", "e=word", "f.g.h=[1, 2]", "f.g.i=NaN", "j=", "k=a=b"]
    nested = {"g": {"h": [1, 2], "i": "NaN"}}
    plain = {"a": 1, "b": 1.5, "c": True, "d": None, "e": "word", "j": "", "k": "a=b"}
    assert settings(given) == {**plain, "f": nested}


def test_a_picture_without_a_stated_pattern_has_nothing_wrong() -> None:
    assert Picture(torch.ones(1, 2, 2, dtype=torch.bool), None, "").wrong == 0
