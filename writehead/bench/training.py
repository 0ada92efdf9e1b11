"""How fast training is: a whole step of ours beside the same model made of PyTorch's own layers, and beside
transformers' Trainer, in turns."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.bench.measure import Timing, alternate
from writehead.core.positions import Positions
from writehead.positions.sinusoidal import Sinusoidal
from writehead.train.config import RunConfig
from writehead.train.start import begin

TEXT = "".join(f"sentence {n} of a text that only has to be long enough; " for n in range(4000))


@dataclass(frozen=True)
class Shape:
    """A language model and its batch.

    Attributes:
        vocab, dim, depth, heads, hidden: of the model.
        batch, length: rows and tokens of a step.
    """

    vocab: int = 8192
    dim: int = 256
    depth: int = 4
    heads: int = 8
    hidden: int = 1024
    batch: int = 8
    length: int = 256


class Twin(nn.Module):
    """The model of PyTorch's own layers: pre-norm encoder layers with a causal mask, tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(shape.vocab, shape.dim).normal_(std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                shape.dim, shape.heads, shape.hidden, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.dim)
        places = Sinusoidal(shape.dim).embed(Positions.range(1, 0, shape.length), torch.float32)
        self.register_buffer("places", places, persistent=False)
        mask = nn.Transformer.generate_square_subsequent_mask(shape.length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        x = F.embedding(tokens, self.table) + self.get_buffer("places")
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return F.linear(self.norm(x), self.table)


def ours(shape: Shape, kind: str) -> dict[str, Any]:
    """The run of a case: "vaswani" is the twin's model, "llama" that of transformers; mqa shares one head.

    Args:
        shape: of the model.
        kind: "vaswani", "llama" or "llama mqa".
    """
    model: dict[str, Any] = {"vocab": shape.vocab, "dim": shape.dim, "depth": shape.depth}
    if kind == "vaswani":
        model["mixer"] = {"name": "mha", "heads": shape.heads, "bias": "all"}
        model["feedforward"] = {"name": "dense", "hidden": shape.hidden, "activation": "gelu", "bias": True}
        model["stack"] = {"name": "residual", "norm": "layer", "eps": 1e-5}
        model["position"] = {"name": "sinusoidal"}
    else:
        model["mixer"] = {"name": "mqa" if kind.endswith("mqa") else "mha", "heads": shape.heads}
        gated = {"activation": "silu", "gated": True}
        model["feedforward"] = {"name": "dense", "hidden": shape.hidden, **gated}
    return {"model": model}


@contextmanager
def our_step(shape: Shape, kind: str, folder: Path) -> Iterator[Callable[[], None]]:
    """A whole step of our loop: data, forward and backward pass, clipping, AdamW."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = {"train": [str(folder / "text.txt")], "length": shape.length, "batch": shape.batch}
    run = RunConfig.from_dict({**ours(shape, kind), "data": data})
    with begin(run, folder / kind.replace(" ", "-"), device="cpu") as trainer:

        def step() -> None:
            trainer.step %= run.loop.steps - 1
            trainer.make_step()

        yield step


def plain_step(model: nn.Module, shape: Shape) -> Callable[[], None]:
    """A plain loop's step on one batch that is there already: both passes, clipping, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = torch.randint(0, 256, (shape.batch, shape.length + 1))
    model.train()

    def step() -> None:
        found = model(rows[:, :-1])
        logits = found if isinstance(found, Tensor) else found.logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def llama(shape: Shape) -> nn.Module:
    """transformers' model of our "llama" case."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def trainer_step(shape: Shape, folder: Path, steps: int = 2) -> Callable[[], float]:
    """Seconds of a step of transformers' Trainer, of the steps between its own set-up and end."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model, spent = llama(shape), []

    class Watch(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            spent.append(time.perf_counter() - self.began)

    rows = torch.randint(0, 256, (shape.batch * steps, shape.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=shape.batch,
        max_steps=steps,
        learning_rate=1e-3,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def run() -> float:
        spent.clear()
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        trainer.train()
        return sum(spent) / len(spent)

    return run


def compare(shape: Shape = Shape(), rounds: int = 5, say: Callable[[str], None] = print) -> dict[str, Timing]:
    """Seconds of a training step by case, measured in turns; transformers' cases only where it is installed.

    Args:
        shape: model and batch.
        rounds: samples of each case.
        say: takes progress.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="writehead-bench-")))
        cases: dict[str, Callable[[], float | None]] = {}
        for kind in ("vaswani", "llama", "llama mqa"):
            cases[f"writehead {kind}"] = stack.enter_context(our_step(shape, kind, folder))
        cases["nn.TransformerEncoderLayer (vaswani)"] = plain_step(Twin(shape), shape)
        if find_spec("transformers") is not None:
            cases["transformers loop (llama)"] = plain_step(llama(shape), shape)
        if find_spec("transformers") is not None and find_spec("accelerate") is not None:
            cases["transformers Trainer (llama)"] = trainer_step(shape, folder / "trainer")

        def progress(name: str, index: int, of: int) -> None:
            say(f"round {index + 1}/{of}: {name}")

        return alternate(cases, rounds, min_seconds=0.0, progress=progress)
