"""The decode benchmark: what it measures is what it says, and texts are judged as they should be."""

import math
import multiprocessing
import time

import pytest
import torch

from writehead.bench import measure as measuring
from writehead.bench.decode import Cell, Need, Run, case, measure
from writehead.bench.machine import Roofs
from writehead.bench.measure import alternate
from writehead.bench.neighbour import busy
from writehead.bench.ours import NATIVE, TORCH, Ours, Scores, contestants, native_missing
from writehead.bench.quality import judge, windows
from writehead.config import ModelConfig
from writehead.convert.load import save
from writehead.core.slots import Store
from writehead.core.system import own_seconds
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.model.blank import blank
from writehead.model.decoder import Decoder

CONFIG = ModelConfig(
    vocab=97,
    dim=64,
    depth=2,
    mixer={"name": "gqa", "heads": 4, "kv_heads": 2},
    feedforward={"name": "dense", "hidden": 96, "activation": "silu", "gated": True},
    stack={"name": "residual", "norm": "rms"},
)
ROOFS = Roofs.given(1e9, 1e11)
IDS = [5, 17, 3, 88, 41]


@pytest.fixture
def model():
    return Decoder(CONFIG).eval()


def ours(model):
    return Ours(TORCH, TorchEngine(model), torch.float32)


@pytest.mark.parametrize(
    ("text", "cell"), [("1@128", (1, 128)), ("64@2048", (64, 2048)), ("prefill@1024", (0, 1024))]
)
def test_cells_are_read_as_they_are_written(text, cell):
    assert Cell.read(text) == cell


@pytest.mark.parametrize("text", ["", "128", "0@5", "1@0", "prefill@", "a@5", "1@-5", "1@5@6"])
def test_other_cells_are_refused(text):
    with pytest.raises(ValueError, match="is not BATCH@CONTEXT or prefill@TOKENS, for instance 1@128"):
        Cell.read(text)


def test_every_sample_of_a_decode_starts_behind_the_same_context(model):
    contestant, seen = ours(model), []
    step = contestant.engine.step
    contestant.engine.step = lambda tokens, state: seen.append(int(state.pos[0])) or step(tokens, state)
    for _ in range(2):
        assert case(contestant, Cell(3, 7), 97)() > 0
    assert seen == [*range(7, 15)] * 2
    contestant.decode(4, 1, 2)
    assert seen[-2:] == [4, 5], "another cell starts anew"


def test_our_engines_continue_and_score_as_the_model_does(model):
    contestant = ours(model)
    assert contestant.greedy(IDS, 6) == generate(model, [IDS], max_new_tokens=6).generations[0].tokens
    scores, logprobs = contestant.score(IDS), model(torch.tensor([IDS]))[0][0].detach().log_softmax(-1)
    assert scores.best == logprobs.argmax(-1).tolist()
    assert scores.logprobs == pytest.approx([float(logprobs[i, t]) for i, t in enumerate(IDS[1:])], abs=1e-4)


def test_the_native_engine_comes_first_where_it_runs(model):
    there = native_missing(model) is None
    names = {kind: [each.name for each in contestants(model, kind, 1)] for kind in ("float32", "int8")}
    assert names == {"float32": [NATIVE, TORCH] if there else [TORCH], "int8": [NATIVE] if there else []}


def test_a_run_gives_a_row_for_each_engine_cell_and_type_and_judges_them_by_float32(model):
    pieces = windows(torch.randint(0, 97, (40,)).tolist(), 20)
    kinds, cells = ["float32", "bfloat16"], [Cell(1, 4), Cell(0, 5)]
    rows, judged, facts = measure(Run(model, kinds, cells, text=pieces, rounds=2), lambda text: None)
    engines = 2 if native_missing(model) is None else 1
    assert len(rows) == 2 * 2 * engines
    assert {row.tokens for row in rows} == {1, 5}
    assert not facts
    by = {(q.engine, q.dtype): q for q in judged}
    assert by[TORCH, "float32"].agreement == 1
    assert by[TORCH, "bfloat16"].agreement > 0.8
    assert by[TORCH, "bfloat16"].perplexity == pytest.approx(by[TORCH, "float32"].perplexity, rel=0.05)


def test_a_model_in_files_is_measured_by_the_native_engine_without_its_weights_in_pytorch(model, tmp_path):
    if (reason := native_missing(model)) is not None:
        pytest.skip(f"no native engine here: {reason}")
    save(model, tmp_path / "saved")
    run = Run(blank(CONFIG), ["float32", "int8"], [Cell(1, 4)], rounds=1, source=tmp_path / "saved")
    rows, _, _ = measure(run, lambda text: None)
    assert [(row.engine, row.dtype) for row in rows] == [(NATIVE, "float32"), (NATIVE, "int8")]
    assert all(row.timing.median > 0 and row.roof_s > 0 for row in rows)
    (ours,) = run.ours("float32")
    expected = generate(model, [IDS], max_new_tokens=6)[0].tokens
    assert ours.greedy(IDS, 6) == expected


def test_the_roofline_counts_weights_as_they_are_held_and_a_prefill_passes_one_token_through_the_head(model):
    bound = Need.of(model, Cell(1, 0 + 8), "float32", 5_000_000, torch.float32).seconds(ROOFS)
    cache = (2 * 2 * 16 * 2 * 4 + 8) * 8 * 2
    assert bound == pytest.approx((5_000_000 + cache) / 1e9, rel=0.01)
    slow = Roofs.given(1e15, 1e6)
    body = 64 * (8 * 16) + 64 * 64 + 3 * 64 * 96
    products = 2 * (100 * 2 * body + 97 * 64) + 2 * 2 * 16 * 4 * 2 * (100 * 101 // 2)
    need = Need.of(model, Cell(0, 100), "float32", 0, torch.float32)
    assert need.seconds(slow) == pytest.approx(products / 1e6)


class Fixed:
    name = "fixed"

    def __init__(self, scores):
        self.scores = scores

    def score(self, ids):
        return self.scores


def test_agreement_counts_positions_and_perplexity_is_of_the_mean():
    right, other = Scores([1, 2, 3, 4], [0.0] * 3), Scores([1, 2, 9, 4], [-1.0, -2.0, -3.0])
    quality = judge(Fixed(other), "int8", [IDS[:4]], [right])
    assert (quality.agreement, quality.tokens) == (0.75, 4)
    assert quality.perplexity == pytest.approx(math.exp(2))


def test_a_slow_cell_ends_after_two_rounds(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    assert alternate({"a": lambda: 1.0}, rounds=5, min_seconds=0.0, budget_s=1.0)["a"].n == 2
    assert alternate({"a": lambda: 1.0}, rounds=5, min_seconds=0.0, max_rounds=5)["a"].n == 5


@pytest.mark.slow
def test_busy_cores_are_busy_until_the_end():
    if own_seconds() is None:
        pytest.skip("this system does not say who is busy")
    with busy(1):
        start, own = own_seconds(), time.process_time()
        while (own_seconds() - start) - (time.process_time() - own) < 0.2:  # what the child has used
            time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_store_of_the_cells_type_is_used(model):
    contestant, seen = ours(model), []
    start = contestant.engine.start
    contestant.engine.start = lambda tokens, store: seen.append(store) or start(tokens, store)
    contestant.prefill(IDS)
    contestant.decode(5, 1, 2)
    assert seen == [Store(capacity=5, dtype=torch.float32), Store(capacity=7, dtype=torch.float32)]
