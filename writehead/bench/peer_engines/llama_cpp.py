"""llama.cpp."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from writehead.bench.peer_engines.common import Scored, accepted, built, rows_of, scored
from writehead.bench.peer_engines.gguf_files import rewrite_gguf


class LlamaCpp:
    """llama.cpp through its low-level batch interface, flash attention off, one stream of cache per row."""

    package = "llama-cpp-python"
    formats: ClassVar = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}
    n_batch = 2048

    def prepare(self, directory: str, gguf: str | None, folder: str, dtype: str) -> str:
        kind = accepted(dtype, self.formats, self.package)
        if gguf is None:
            raise ValueError("llama.cpp needs a GGUF file of the model; none was given")
        target = Path(folder) / f"{Path(gguf).stem}-{kind}.gguf"
        return str(built(target, lambda path: rewrite_gguf(Path(gguf), path, kind)))

    def load(self, path: str, dtype: str, threads: int) -> dict[str, Any]:
        import llama_cpp
        import numpy

        self.np, self.api, self.threads = numpy, llama_cpp.llama_cpp, threads
        self.quiet = self.api.llama_log_callback(lambda level, text, data: None)
        self.api.llama_log_set(self.quiet, None)
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.context, self.key, self.room = None, (0, 0), 0
        return {
            "weights": accepted(dtype, self.formats, self.package),
            "compute": dtype,
            "attention": "no flash",
        }

    def _open(self, rows: int, slots: int) -> None:
        """A fresh context for `rows` sequences of `slots` tokens."""
        if self.context is not None:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = rows * (-(-slots // 256) * 256), rows, False
        params.n_batch, params.n_ubatch = self.n_batch, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context, self.key = self.api.llama_init_from_model(self.model, params), (0, 0)
        if not self.context:
            self.context = None
            raise MemoryError(f"llama.cpp cannot hold {rows} rows of {slots} tokens")

    def _run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Evaluate (token, position, row, wants logits); the best next token of each that wants logits."""
        self._evaluate(tokens)
        return [int(self._logits(i).argmax()) for i, token in enumerate(tokens) if token[3]]

    def _logits(self, i: int) -> Any:
        return self.np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.vocab,))

    def _evaluate(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, pos, row, wants) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, 1
            batch.seq_id[i][0], batch.logits[i] = row, wants
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _feed(self, ids: list[int], row: int) -> list[int]:
        best: list[int] = []
        for at in range(0, len(ids), self.n_batch):
            piece = ids[at : at + self.n_batch]
            last = len(ids) - 1
            best += self._run([(t, at + i, row, at + i == last) for i, t in enumerate(piece)])
        return best

    def prefill(self, ids: list[int]) -> float:
        self._open(1, len(ids) + 1)
        start = time.perf_counter()
        self._feed(ids, 0)
        return time.perf_counter() - start

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        if self.key != (context, batch) or self.room < context + new_tokens:
            self.room = context + new_tokens
            self._open(batch, self.room)
            rows = rows_of(self.vocab, batch, context)
            self.first = [self._feed(ids, row)[0] for row, ids in enumerate(rows)]
            self.key = (context, batch)
        best, start = self.first, time.perf_counter()
        for pos in range(context, context + new_tokens):
            best = self._run([(token, pos, row, True) for row, token in enumerate(best)])
        seconds = time.perf_counter() - start
        memory = self.api.llama_get_memory(self.context)
        for row in range(batch):
            self.api.llama_memory_seq_rm(memory, row, context, -1)
        return seconds / new_tokens

    def greedy(self, ids: list[int], n: int) -> list[int]:
        self._open(1, len(ids) + n)
        found = self._feed(ids, 0)
        while len(found) < n:
            found += self._run([(found[-1], len(ids) + len(found) - 1, 0, True)])
        return found

    def score(self, ids: list[int]) -> Scored:
        self._open(1, len(ids))
        self._evaluate([(token, i, 0, True) for i, token in enumerate(ids)])
        return scored(self.np.stack([self._logits(i) for i in range(len(ids))]), ids)
