"""The training loop: one step on one screen, and what happens between steps."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from writehead.config import ModelConfig
from writehead.core.state import State, detach
from writehead.decode.generate import generate
from writehead.model.decoder import Decoder
from writehead.model.parts import weights
from writehead.train import carry, checkpoint
from writehead.train.config import RunConfig
from writehead.train.data import Data
from writehead.train.objective import Model, Objective, load_into
from writehead.train.optim import clip, rate, set_rate, state_of
from writehead.train.order import mix
from writehead.train.parallel import Team, whole
from writehead.train.report import Reporter, memory_bytes


class Diverged(ValueError):
    """The loss or its gradient is no number any more."""


@dataclass
class Meter:
    """Sums since the last line of the log.

    Attributes:
        nll, targets, right: of the training targets.
        read, seconds: tokens that this process read, and how long its steps took.
    """

    nll: float = 0.0
    targets: int = 0
    right: int = 0
    read: int = 0
    seconds: float = 0.0


@dataclass
class Trainer:
    """A run in progress; `start.begin` makes one.

    Attributes:
        run, out, team, data: what trains where with whom on what.
        config: of the model.
        objective: the model and its loss; `wrapped` is what the processes share.
        optimizer: made of the wrapped parameters.
        reporter: what is said.
        step: optimiser steps done.
        states: what each piece of rows carries to the next segment.
        meter: sums for the log.
        saved: the last checkpoint.
        stop: have the processes agreed to end?
    """

    run: RunConfig
    out: Path
    team: Team
    data: Data
    config: ModelConfig
    objective: Objective
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    reporter: Reporter
    step: int = 0
    states: list[State] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    saved: Path | None = None
    stop: bool = False
    _asked: bool = False

    @property
    def model(self) -> Model:
        """The model that learns."""
        return self.objective.model

    def train(self) -> Path:
        """Make the steps that are left.

        Returns:
            The last checkpoint.

        Raises:
            Diverged: the loss or its gradient became no number; the weights are those before that step.
            KeyboardInterrupt: Ctrl-C (or SIGTERM) was pressed; a checkpoint was written.
            ValueError: a checkpoint cannot be written.
        """
        every, generator = self.run.report, torch.get_rng_state()
        try:
            with self._signals():
                while self.step < self.run.loop.steps and not self.stop:
                    norm = self.make_step()
                    last = self.step == self.run.loop.steps or self.stop
                    self._report(norm, last or self.step % every.log_every == 0)
                    if last or (every.eval_every and self.step % every.eval_every == 0):
                        self.evaluate(sample=not self.stop)
                    if last or (every.save_every and self.step % every.save_every == 0):
                        self.save()
            if self.stop:
                self.reporter.say(f"interrupted at step {self.step}; go on with --resume auto")
                raise KeyboardInterrupt
            assert self.saved is not None
            return self.saved
        finally:
            torch.set_rng_state(generator)
            self.reporter.close()

    def make_step(self) -> float:
        """One optimiser step; returns the norm of its gradient."""
        loop, team, began = self.run.loop, self.team, time.perf_counter()
        batch = self.data.train(self.step)
        targets, pieces = batch.scored, loop.accumulate
        set_rate(self.optimizer, rate(self.step, self.run.optim, loop.steps))
        self.wrapped.train()
        loss = nll = right = 0.0
        for n in range(pieces):
            own = team.rank * pieces + n
            piece = batch.piece(own, team.world * pieces).to(team.device)
            torch.manual_seed(mix(self.run.seed, 3, self.step, own))  # dropout is a function of the step too
            with team.syncing(self.wrapped, n == pieces - 1):
                with self._autocast():
                    sums, state = self.wrapped(piece, self._carried(n, len(piece.tokens), batch.fresh))
                (sums.loss * (team.world / targets)).backward()  # gradients are averaged over the processes
            self._carry(n, state)
            loss, nll, right = loss + sums.loss.item(), nll + sums.nll.item(), right + sums.right.item()
            self.meter.read += piece.read
        loss, nll, right, stops = team.sum(loss, nll, right, float(self._asked))
        norm = clip(self.wrapped.parameters(), loop.clip or math.inf, whole)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(self._advice(loss / targets, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.stop = self.step + 1, stops > 0
        self.meter.nll, self.meter.right = self.meter.nll + nll, self.meter.right + int(right)
        self.meter.targets += targets
        self.meter.seconds += time.perf_counter() - began
        return norm

    @torch.no_grad()
    def evaluate(self, sample: bool = True) -> dict[str, float]:
        """Score validation batches, and continue a text."""
        self.objective.eval()
        nll = right = targets = 0.0
        there = self.data.valid.count
        count = min(self.run.report.eval_batches, there)
        for index in range(count):
            batch = self.data.valid(index * there // count).to(self.team.device)
            with self._autocast():
                sums, _ = self.objective(batch)
            nll, right, targets = nll + sums.nll.item(), right + sums.right.item(), targets + batch.scored
        loss = nll / targets
        values = {"eval/loss": loss, "eval/accuracy": right / targets}
        if self.run.data.kind == "image":
            values["eval/bits_per_dim"] = loss / math.log(2)
        elif self.run.data.kind != "labelled":
            values["eval/perplexity"] = math.exp(min(loss, 700))
        if math.isfinite(loss):
            self.reporter.log(self.step, values)
        words = "  ".join(f"{name.partition('/')[2]} {value:.4g}" for name, value in values.items())
        self.reporter.say(f"step {self.step}  evaluation: {words}")
        if sample and self.run.report.sample is not None and self.run.data.kind == "text":
            self.reporter.say(f"sample: {self.sample(self.run.report.sample)!r}")
        return values

    def sample(self, text: str) -> str:
        """A text and its continuation, drawn from a copy of the model (decoding lays weights out anew)."""
        tensors = self._weights()
        if not self.team.first:
            return ""
        copy = Decoder(self.config)
        load_into(copy, tensors)
        tokenizer, length = self.data.tokenizer, self.run.report.sample_tokens
        assert tokenizer is not None
        ids = tokenizer.encode(text) or sorted(tokenizer.eos)
        room = copy.embedding.position.max_context
        length = length if room is None else min(length, room + 1 - len(ids))
        if length < 1 or not ids:
            return text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a sample may be longer than the rows of training
            said = generate(copy, [ids], tokenizer=tokenizer, max_new_tokens=length, temperature=0.8, seed=0)
        return text + (said[0].text or "")

    def save(self) -> None:
        """Write a checkpoint and remove old ones."""
        model = self._weights()
        optimizer = state_of(self.optimizer, self.named(), whole)
        facts = {
            "run": self.run.to_dict(),
            "data": self.data.digest,
            "meter": [self.meter.nll, self.meter.targets, self.meter.right],
            "world": self.team.world,
        }
        state = carry.kept(self.states)
        if self.team.first:
            made = checkpoint.Checkpoint(self.step, model, optimizer, state, facts)
            try:
                self.saved = checkpoint.write(self.out, made, self.config, self.data.tokenizer)
            except (OSError, ValueError) as error:
                text = getattr(error, "strerror", None) or str(error)
                raise ValueError(
                    f"the checkpoint of step {self.step} cannot be written: {text}; {self._last_good()}"
                ) from error
            checkpoint.keep_last(self.out, self.run.report.keep)
        self.saved = checkpoint.path_of(self.out, self.step)
        self.team.wait()

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters with their names in the model, shared ones once."""
        return list(self.model.named_parameters())

    def _weights(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in weights(self.model).items()}

    def _report(self, norm: float, line: bool) -> None:
        meter = self.meter
        speed = meter.read * self.team.world / max(meter.seconds, 1e-9)
        memory = memory_bytes(self.team.device)
        loss = meter.nll / max(meter.targets, 1)
        words = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {memory / 1e6:,.0f} MB"
        self.reporter.progress(self.step, words, line)
        if line:
            values = {
                "train/loss": loss,
                "train/accuracy": meter.right / max(meter.targets, 1),
                "lr": rate(self.step - 1, self.run.optim, self.run.loop.steps),
                "grad_norm": norm,
                "tokens_per_second": speed,
                "memory_bytes": memory,
            }
            self.reporter.log(self.step, values)
            self.meter = Meter()

    def _carried(self, piece: int, rows: int, fresh: bool) -> State:
        """The state that a piece of rows goes on from; None where nothing is carried."""
        if not self.run.loop.carry_state:
            return None
        if fresh or piece >= len(self.states):
            assert isinstance(self.model, Decoder)
            return self.model.init_state(rows)
        return self.states[piece]

    def _carry(self, piece: int, state: State) -> None:
        if state is not None:
            self.states[piece : piece + 1] = [detach(state)]

    def _autocast(self) -> Any:
        on = self.run.loop.precision == "bfloat16"
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=on)

    def _advice(self, loss: float, norm: float) -> str:
        optim, loop = self.run.optim, self.run.loop
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        clip = "" if loop.clip else ", loop.clip=1.0 (now off)"
        half = "" if loop.precision == "float32" else ", loop.precision=float32"
        return (
            f"step {self.step + 1} gave {what}; {self._last_good()}. Try a lower optim.lr (now "
            f"{optim.lr:g}), a longer optim.warmup (now {optim.warmup}){clip}{half}"
        )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step at hand; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
