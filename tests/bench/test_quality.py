"""Quality of an engine: perplexity and agreement by their definitions, whatever the pieces."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from writehead.bench import ours
from writehead.bench.ours import Ours
from writehead.bench.quality import Quality, judge, read_text, windows
from writehead.cli import app
from writehead.config import ModelConfig
from writehead.convert.load import save
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.engine import TorchEngine
from writehead.model.decoder import Decoder

IDS = [int(x) for x in torch.randint(0, 30, (60,), generator=torch.Generator().manual_seed(1))]


def model(seed: int, vocab: int = 30, std: float = 0.5) -> Decoder:
    torch.manual_seed(seed)
    spec = {"name": "mqa", "heads": 2}
    made = Decoder(
        ModelConfig(vocab=vocab, dim=16, depth=2, mixer=spec, position={"name": "rotary"})
    ).double()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return made


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_perplexity_and_agreement_are_those_of_whole_windows(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "PIECE", piece)
    one, other = model(0), model(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    texts = windows(IDS, 20)
    engines = {name: Ours(name, TorchEngine(m)) for name, m in (("one", one), ("other", other))}
    reference = [engines["one"].score(text) for text in texts]
    found = [judge(engine, "float64", texts, reference) for engine in engines.values()]
    with torch.no_grad():
        scores = {
            name: m(torch.tensor(texts))[0].log_softmax(-1) for name, m in (("one", one), ("other", other))
        }
    targets = torch.tensor(texts)[:, 1:]
    best = scores["one"].argmax(-1)
    for row in found:
        wanted = math.exp(-float(scores[row.engine][:, :-1].gather(2, targets[..., None]).mean()))
        assert row.perplexity == pytest.approx(wanted, rel=1e-5)
        assert row.agreement == float((scores[row.engine].argmax(-1) == best).double().mean())
        assert row.tokens == 60
    assert found[0].agreement == 1
    assert 0 < found[1].agreement < 1


def test_windows_follow_each_other_and_leave_the_rest() -> None:
    assert windows(IDS, 25) == [IDS[:25], IDS[25:50]]
    for length in (1, 61):
        with pytest.raises(
            ValueError, match=f"windows of {length} tokens: give at least 2, and at most the 60"
        ):
            windows(IDS, length)


def test_the_standard_error_is_that_of_a_share() -> None:
    assert Quality("x", "int8", 400, 9.0, 0.9).agreement_error == pytest.approx(0.015)
    assert Quality("x", "int8", 400, 9.0, 0.9).to_dict()["agreement_error"] == pytest.approx(0.015)


def test_a_text_is_read_as_far_as_it_is_needed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 10)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("grün".encode()))
    assert read_text(tmp_path, 5) == "a" * 10
    assert read_text(tmp_path, 11) == "a" * 10 + "b" * 10
    assert read_text(tmp_path / "c.txt.gz", 100) == "grün"


def test_the_verb_compares_types_of_one_model(tmp_path: Path, capsys: Any) -> None:
    save(model(0, vocab=259, std=0.1).float(), tmp_path / "model", tokenizer=Tokenizer.bytes())
    (tmp_path / "text.txt").write_text("words and more words " * 9)
    arguments = ["bench", "quality", str(tmp_path / "text.txt"), "--model", str(tmp_path / "model")]
    arguments += ["--dtype", "int8", "--window", "32", "--tokens", "70", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--json"])
    assert not ended.value.code
    reference, eight = json.loads(capsys.readouterr().out)["qualities"]
    assert (reference["dtype"], eight["dtype"]) == ("float32", "int8")
    assert reference["tokens"] == eight["tokens"] == 64
    assert eight["perplexity"] == pytest.approx(reference["perplexity"], rel=0.05)
    assert 0.7 < eight["agreement"] <= 1
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    assert "as float32" in capsys.readouterr().out
