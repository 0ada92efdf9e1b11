"""Every family against transformers on tiny random models: the same logits, however tokens come."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from their_models import CASES, DECODERS, ENCODERS, SEQ2SEQ, make
from torch import Tensor

from writehead.convert.errors import BadFile
from writehead.convert.load import Loaded, load

pytestmark = pytest.mark.filterwarnings("ignore:left out, since the model has no place:UserWarning")
TOLERANCE = (
    1e-5  # largest difference of a logit in float32, in units of the largest logit or of 1 if that is less
)


class Pair(NamedTuple):
    theirs: torch.nn.Module
    ours: Loaded


def saved_and_loaded(case: str, folder: Path) -> Pair:
    model = make(case)
    model.save_pretrained(folder)
    return Pair(model, load(folder))


@pytest.fixture(scope="module", params=DECODERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return saved_and_loaded(request.param, tmp_path_factory.mktemp("decoder") / "model")


@pytest.fixture(scope="module", params=SEQ2SEQ)
def translator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return saved_and_loaded(request.param, tmp_path_factory.mktemp("seq2seq") / "model")


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return saved_and_loaded(request.param, tmp_path_factory.mktemp("encoder") / "model")


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def theirs_of(pair: Pair, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.theirs(input_ids=ids).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1, "logits near zero would hide a difference"
    assert (ours - theirs).abs().max() < TOLERANCE * max(1, theirs.abs().max())


def test_whole_sequences_give_their_logits(pair: Pair) -> None:
    ids = tokens(2, 21)
    with torch.no_grad():
        close(pair.ours.model(ids)[0], theirs_of(pair, ids))


@pytest.mark.parametrize("size", [1, 7])
def test_pieces_of_a_sequence_give_their_logits_of_the_whole(pair: Pair, size: int) -> None:
    ids = tokens(2, 21)
    with torch.no_grad():
        state, pieces = pair.ours.model.init_state(2), []
        for piece in ids.split(size, 1):
            logits, state = pair.ours.model.step(piece, state)
            pieces.append(logits)
        close(torch.cat(pieces, 1), theirs_of(pair, ids))


def test_a_padded_batch_gives_their_logits_of_single_rows(pair: Pair) -> None:
    rows = [tokens(1, n, seed=n)[0] for n in (5, 13, 1)]
    left, right = (torch.full((3, 13), -1) for _ in range(2))
    for i, row in enumerate(rows):
        left[i, 13 - len(row) :] = row
        right[i, : len(row)] = row
    with torch.no_grad():
        for batch in (left, right):
            logits = pair.ours.model(batch)[0]
            for i, row in enumerate(rows):
                close(logits[i, batch[i] >= 0], theirs_of(pair, row[None])[0])


def test_sources_and_targets_give_their_logits(translator: Pair) -> None:
    source, target = tokens(2, 17), tokens(2, 9, seed=1)
    with torch.no_grad():
        theirs = translator.theirs(input_ids=source, decoder_input_ids=target).logits
        close(translator.ours.model(source, target)[0], theirs)


@pytest.mark.parametrize("size", [1, 4])
def test_pieces_of_a_target_give_their_logits_of_the_whole(translator: Pair, size: int) -> None:
    source, target = tokens(2, 17), tokens(2, 9, seed=1)
    with torch.no_grad():
        theirs = translator.theirs(input_ids=source, decoder_input_ids=target).logits
        state, pieces = translator.ours.model.read(source)[0], []
        for piece in target.split(size, 1):
            logits, state = translator.ours.model.step(piece, state)
            pieces.append(logits)
        close(torch.cat(pieces, 1), theirs)


def test_padded_sources_and_targets_give_their_logits_of_single_rows(translator: Pair) -> None:
    sources, targets = torch.full((2, 11), -1), torch.full((2, 6), -1)
    sources[0], sources[1, :4] = tokens(1, 11)[0], tokens(1, 4, seed=2)[0]
    targets[0, :3], targets[1] = tokens(1, 3, seed=3)[0], tokens(1, 6, seed=4)[0]
    with torch.no_grad():
        logits = translator.ours.model(sources, targets)[0]
        for i in range(2):
            source, target = (rows[i][rows[i] >= 0][None] for rows in (sources, targets))
            theirs = translator.theirs(input_ids=source, decoder_input_ids=target).logits[0]
            close(logits[i, targets[i] >= 0], theirs)


def read_by_theirs(pair: Pair, ids: Tensor, types: Tensor) -> Tensor:
    given = pair.theirs(input_ids=ids, token_type_ids=types)
    return given.logits if "logits" in given else given.last_hidden_state


def read_by_ours(pair: Pair, ids: Tensor, types: Tensor | None) -> Tensor:
    x = pair.ours.model(ids, types)[0]
    return x if pair.ours.config.head_transform is None else pair.ours.model.logits(x)


@torch.no_grad()
def test_rows_of_an_encoder_give_their_logits_of_each_row(encoder: Pair) -> None:
    ids, types = tokens(3, 20).clamp_min(2), tokens(3, 20, seed=1) % 3  # 0 or 1 is padding to theirs
    ours = read_by_ours(encoder, ids, types)
    for i in range(3):  # theirs depends on the other rows of a batch
        close(ours[i], read_by_theirs(encoder, ids[i : i + 1], types[i : i + 1])[0])
    plain = read_by_theirs(encoder, ids[:1], torch.zeros_like(ids[:1]))
    close(read_by_ours(encoder, ids[:1], None), plain)
    assert (plain - ours[:1]).abs().max() > 0.01


@torch.no_grad()
def test_with_as_many_landmarks_as_tokens_transformers_attends_exactly_at_every_length(
    tmp_path: Path,
) -> None:
    pair = saved_and_loaded("nystromformer, as many landmarks as tokens", tmp_path / "model")
    assert pair.ours.config.layer("mixer", 0)["landmarks"] == 64
    batch, types = torch.full((3, 33), -1), tokens(3, 33, seed=1) % 3
    for i, length in enumerate((33, 7, 20)):
        batch[i, :length] = tokens(1, length, seed=i)[0]
    ours = read_by_ours(pair, batch, types)
    for i, length in enumerate((33, 7, 20)):
        row = (batch[i : i + 1, :length], types[i : i + 1, :length])
        close(ours[i, :length], read_by_theirs(pair, *row)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inv_coeff_init_option": True}, "inv_coeff_init_option=True is not supported; accepted: False"),
        ({"num_landmarks": 7}, "segment_means_seq_len=20 is not a multiple of num_landmarks=7"),
        ({"num_attention_heads": 5}, "hidden_size=48 is not a multiple of num_attention_heads=5"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported; accepted: True"),
        ({"hidden_act": "gelu_10"}, r"hidden_act='gelu_10' is not supported; did you mean 'gelu'\?"),
    ],
)
def test_what_a_nystromformer_config_may_not_say_is_refused(changes: dict, message: str) -> None:
    from writehead.convert.huggingface import read_config

    values = make("nystromformer, masked words").config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_a_classifier_of_transformers_is_refused_with_the_names_of_its_head(tmp_path: Path) -> None:
    import transformers

    config = make("nystromformer, no head").config
    transformers.NystromformerForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(BadFile, match=r"4 tensors that no rule takes: 'classifier\.dense\.bias'"):
        load(tmp_path / "model")


def test_every_family_has_a_case() -> None:
    from writehead.convert.huggingface import FILES

    assert {make_type(case) for case in CASES} == set(FILES)


def make_type(case: str) -> str:
    return make(case).config.model_type


def test_a_window_counts_the_query_itself_in_both_libraries(tmp_path: Path) -> None:
    """With one layer, token 5 must change the logits of token 8 through a window of 4, but not those of 9."""
    pair = Pair(make("mistral, window", num_hidden_layers=1), None)  # type: ignore[arg-type]
    pair.theirs.save_pretrained(tmp_path / "model")
    ours = load(tmp_path / "model")
    assert ours.config.layer("mixer", 0)["pattern"] == {"name": "window", "window": 4}
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 97
    with torch.no_grad():
        for logits in (lambda x: ours.model(x)[0], lambda x: theirs_of(pair, x)):
            moved = (logits(ids) - logits(changed)).abs().amax((0, 2)) > 1e-6
            assert moved.tolist() == [5 <= t < 9 for t in range(12)]


def test_one_layer_in_three_may_have_a_window(tmp_path: Path) -> None:
    model = make(
        "qwen2, window in some layers", layer_types=["full_attention", "sliding_attention", "full_attention"]
    )
    model.save_pretrained(tmp_path / "model")
    config = load(tmp_path / "model").config
    windows = [config.layer("mixer", i).get("pattern", {}).get("window") for i in range(3)]
    assert windows == [None, 4, None]
