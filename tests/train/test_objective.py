"""The loss is what its formula says, whatever the pieces, and gradients do not depend on how they were saved."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Batch
from writehead.train.config import LossConfig, OptimConfig
from writehead.train.objective import Objective, auxiliary, load_into, recompute
from writehead.train.optim import clip, make_optimizer, rate
from writehead.train.rehearsal import Ledger, Rehearsal

DECODER: dict[str, Any] = {"vocab": 11, "dim": 8, "depth": 2, "mixer": {"name": "mqa", "heads": 2}}
ENCODER: dict[str, Any] = {**DECODER, "kind": "encoder", "mixer": {"name": "bidirectional", "heads": 2}}
CROSS: dict[str, Any] = {"cross": {"name": "cross", "heads": 2}, "encoder": ENCODER, "kind": "seq2seq"}


def batch(rows: int = 4, length: int = 7) -> Batch:
    tokens = torch.randint(0, 11, (rows, length + 1))
    tokens[0, 5:] = -1
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), tokens.clone())


@pytest.mark.parametrize(("smooth", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.02)])
def test_the_loss_is_its_formula_token_by_token(smooth: float, z: float) -> None:
    model, given = Decoder(ModelConfig.from_dict(DECODER)).double(), batch()
    sums, _ = Objective(model, LossConfig(label_smoothing=smooth, z_loss=z))(given)
    logits, _ = model(given.tokens)
    loss = nll = right = 0.0
    for row, targets in zip(logits.tolist(), given.target.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target < 0:
                continue
            whole = math.log(sum(math.exp(s) for s in scores))
            nll += whole - scores[target]
            spread = sum(whole - s for s in scores) / len(scores)
            loss += (1 - smooth) * (whole - scores[target]) + smooth * spread + z * whole**2
            right += scores[target] == max(scores)
    assert sums.loss.item() == pytest.approx(loss, rel=1e-12)
    assert sums.nll.item() == pytest.approx(nll, rel=1e-12)
    assert sums.right.item() == right


def test_pieces_of_a_batch_add_up_to_its_sums() -> None:
    objective, given = (
        Objective(Decoder(ModelConfig.from_dict(DECODER)).double(), LossConfig(z_loss=0.1)),
        batch(),
    )
    whole = objective(given)[0].loss.item()
    assert sum(objective(given.piece(i, 2))[0].loss.item() for i in range(2)) == pytest.approx(
        whole, rel=1e-12
    )


def test_an_encoder_chooses_a_class_by_the_mean_of_its_vectors() -> None:
    model, given = Encoder(ModelConfig.from_dict(ENCODER)).double(), batch()
    target = torch.tensor([[0], [1], [1], [0]])
    sums, _ = Objective(model, LossConfig(), choices=(9, 3))(Batch(given.tokens, target))
    expected = 0.0
    for tokens, label in zip(given.tokens, target[:, 0].tolist(), strict=True):
        x, _, _ = model(tokens[tokens >= 0][None])
        scores = model.embedding.table[[9, 3]] @ x[0].mean(0)
        expected -= scores.log_softmax(-1)[label].item()
    assert sums.nll.item() == pytest.approx(expected, rel=1e-12)


def test_a_decoder_chooses_a_class_by_its_last_vector() -> None:
    model, given = Decoder(ModelConfig.from_dict(DECODER)).double(), batch()
    target = torch.tensor([[0], [1], [1], [0]])
    sums, _ = Objective(model, LossConfig(), choices=(9, 3))(Batch(given.tokens, target))
    expected = 0.0
    for tokens, label in zip(given.tokens, target[:, 0].tolist(), strict=True):
        logits, _ = model(tokens[tokens >= 0][None])
        expected -= logits[0, -1, [9, 3]].log_softmax(-1)[label].item()
    assert sums.nll.item() == pytest.approx(expected, rel=1e-12)


def test_auxiliary_losses_are_weighted_by_name_and_other_values_left_alone() -> None:
    aux = {"balance_loss": torch.tensor(2.0), "z_loss": torch.tensor([1.0, 3.0]), "stream": torch.tensor(9.0)}
    assert auxiliary(aux, {"balance_loss": 0.5}) == 1 + 2
    with pytest.raises(
        ValueError, match=r"unknown auxiliary loss in loss.aux 'balance'; did you mean 'balance_loss'"
    ):
        auxiliary(aux, {"balance": 1.0})


class WithLoss(Decoder):
    """A decoder that reports an auxiliary loss."""

    def whole(self, tokens: Any, memories: Any = None) -> Any:
        x, _ = super().whole(tokens, memories)
        return x, {"size_loss": x.square().mean()}


def test_an_auxiliary_loss_counts_as_often_as_there_are_targets() -> None:
    model, given = WithLoss(ModelConfig.from_dict(DECODER)), batch()
    plain, _ = Objective(model, LossConfig(aux={"size_loss": 0.0}))(given)
    more, _ = Objective(model, LossConfig(aux={"size_loss": 0.5}))(given)
    size = model.whole(given.tokens)[1]["size_loss"]
    assert (more.loss - plain.loss).item() == pytest.approx(0.5 * size.item() * given.scored, rel=1e-4)
    assert more.nll == plain.nll


@pytest.mark.parametrize("position", ["rotary", "t5", "alibi"])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "seq2seq"])
def test_recomputed_layers_give_the_same_gradients(kind: str, position: str) -> None:
    config: dict[str, Any] = {"decoder": DECODER, "encoder": ENCODER, "seq2seq": {**DECODER, **CROSS}}[kind]
    config = {**config, "position": {"name": position}, "stack": {"name": "residual", "dropout": 0.2}}
    given = batch() if kind != "encoder" else batch()._replace(target=torch.tensor([[0], [1], [1], [0]]))
    choices = (9, 3) if kind == "encoder" else ()
    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        build: Any = {"decoder": Decoder, "encoder": Encoder, "seq2seq": Seq2Seq}[kind]
        model = build(ModelConfig.from_dict(config)).double().train()
        if again:
            recompute(model)
        torch.manual_seed(2)
        Objective(model, LossConfig(), choices)(given)[0].loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("mixer", "stack"), [("luna_encoder", "residual"), ("luna_encoder", "reversible"), ("mqa", "reversible")]
)
def test_recomputed_layers_hand_on_what_the_others_do(mixer: str, stack: str) -> None:
    kind = "encoder" if mixer == "luna_encoder" else "decoder"
    values = {**DECODER, "depth": 3, "kind": kind, "mixer": {"name": mixer, "heads": 2}}
    values |= {"stack": {"name": stack, "dropout": 0.1}, "position": {"name": "sinusoidal"}}
    tokens, found = torch.randint(0, 11, (2, 7)), []
    for again in (False, True):
        torch.manual_seed(1)
        model: Any = (Encoder if kind == "encoder" else Decoder)(ModelConfig.from_dict(values)).double()
        if again:
            recompute(model)
        torch.manual_seed(2)
        model(tokens)[0].square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_recomputed_layers_move_centroids_once() -> None:
    values = {**DECODER, "mixer": {"name": "routing", "heads": 2, "clusters": 2}}
    tokens, found = torch.randint(0, 11, (2, 7)), []
    for again in (False, True):
        torch.manual_seed(1)
        model: Any = Decoder(ModelConfig.from_dict(values))
        if again:
            recompute(model)
        model(tokens)[0].square().sum().backward()
        found.append(model.stack.blocks[0].mixer.centroids.counts.clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones_like(found[0]))


def test_recomputed_layers_keep_less() -> None:
    sizes = []
    for again in (False, True):
        model = Decoder(ModelConfig.from_dict({**DECODER, "depth": 6})).train()
        if again:
            recompute(model)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: (k.append(t.nbytes), t)[1], lambda t: t
        ):
            Objective(model, LossConfig())(batch(8, 32))
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 3


def test_weights_that_do_not_fit_are_named() -> None:
    model = Decoder(ModelConfig.from_dict(DECODER))
    own = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"the weights lack embedding.table"):
        load_into(model, {k: v for k, v in own.items() if k != "embedding.table"})
    with pytest.raises(ValueError, match="the weights have, and the model lacks, extra"):
        load_into(model, {**own, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"embedding.table has shape \(3, 8\); the model's has \(11, 8\)"):
        load_into(model, {**own, "embedding.table": torch.zeros(3, 8)})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.1, 9: 1.0, 59: 0.55, 109: 0.1}),
        ("linear", {0: 0.1, 9: 1.0, 59: 0.55, 84: 0.325, 109: 0.1}),
        ("inverse_sqrt", {4: 0.5, 9: 1.0, 39: 0.5, 159: 0.25}),
        ("constant", {4: 0.5, 9: 1.0, 500: 1.0}),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_falls_as_its_schedule_says(
    schedule: str, expected: dict[int, float]
) -> None:
    config = OptimConfig(lr=1.0, warmup=10, schedule=schedule, final=0.1)
    assert {step: rate(step, config, 110) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("most", [0.5, 5.0, math.inf])
def test_gradients_are_shrunk_as_torch_does_and_left_where_they_are_small(most: float) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(len(a))
        b.grad = a.grad.clone()
    assert clip(ours, most, lambda t: t) == torch.nn.utils.clip_grad_norm_(theirs, most).item()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mixer", ["mqa", "longformer_causal", "routing"])
@pytest.mark.parametrize("order", ["pre", "post", "parallel"])
def test_training_without_states_is_the_call_from_the_empty_past(mixer: str, order: str) -> None:
    stack = {"name": "residual", "order": order}
    config = {**DECODER, "mixer": {"name": mixer, "heads": 2}, "stack": stack}
    model, tokens = Decoder(ModelConfig.from_dict(config)).double().eval(), batch().tokens
    x, _, _ = model.hidden(tokens, model.init_state(len(tokens)))
    assert torch.allclose(model.whole(tokens)[0], x, atol=1e-12)


def test_training_caches_nothing() -> None:
    model, given, seen = Decoder(ModelConfig.from_dict(DECODER)), batch(), []
    for block in model.blocks:
        block.mixer.init_state = lambda *_, seen=seen: seen.append(1)
    Objective(model, LossConfig())(given)
    assert not seen
    pos = Positions(torch.arange(7).expand(4, -1))
    with pytest.raises(AttributeError):  # a call that keeps states asks for them
        model.stack(model.embedding(given.tokens, pos), pos, ((None, None),) * 2)
    assert seen


def test_only_matrices_decay() -> None:
    named = list(Decoder(ModelConfig.from_dict(DECODER)).named_parameters())
    optimizer = make_optimizer(named, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in named} == {
        name: 0.3 if p.dim() > 1 else 0.0 for name, p in named
    }


@pytest.mark.parametrize(("values", "kind"), [(DECODER, Decoder), (DECODER | CROSS, Seq2Seq)])
def test_a_loss_in_chunks_has_the_sums_and_gradients_of_the_whole(values: dict[str, Any], kind: Any) -> None:
    model, given = kind(ModelConfig.from_dict(values)).double(), batch()
    parameters, found = list(model.parameters()), []
    for chunk in (0, 1, 3, 100):
        config = LossConfig(label_smoothing=0.1, z_loss=0.01, chunk=chunk)
        sums, _ = Objective(model, config)(given)
        found.append([*sums[1:], sums.loss.detach(), *torch.autograd.grad(sums.loss, parameters)])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("chunk", [0, 2])
def test_training_never_holds_all_logits(chunk: int) -> None:
    config = {**DECODER, "vocab": 50_000}
    ledger = Ledger()
    with Rehearsal(ledger):
        model = Decoder(ModelConfig.from_dict(config))
        before = ledger.peak = ledger.live
        Objective(model, LossConfig(chunk=chunk))(batch(16, 64))[0].loss.backward()
    table, logits = 50_000 * 8 * 4, 16 * 64 * 50_000 * 4
    assert before + table < ledger.peak < before + 2 * table + logits / 4


def test_a_head_with_bias_scale_and_transform_has_the_gradients_of_its_logits() -> None:
    config = {**DECODER, "head_bias": True, "logit_scale": 0.5, "head_transform": "gelu"}
    model, given, found = Decoder(ModelConfig.from_dict(config)).double(), batch(), []
    with torch.no_grad():
        model.embedding.bias.normal_()
    parameters = list(model.parameters())
    sums, _ = Objective(model, LossConfig())(given)
    found.append([sums.loss.detach(), *torch.autograd.grad(sums.loss, parameters)])
    logits, _ = model(given.tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), given.target.flatten(), ignore_index=-1, reduction="sum")
    found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(*found, strict=True))
