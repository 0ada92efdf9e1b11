"""OpenVINO GenAI."""

import itertools
from pathlib import Path
from typing import Any, ClassVar

from writehead.bench.peer_engines.common import Rows, accepted, built, rows_of
from writehead.bench.peer_engines.gguf_files import rewrite_gguf


class OpenVINO:
    """OpenVINO GenAI's pipeline on a GGUF; its reader knows no F32, so float32 means F16 weights, widened."""

    package = "openvino-genai"
    formats: ClassVar = {"float32": "F16", "int8": "Q8_0", "int4": "Q4_1"}

    def prepare(self, directory: str, gguf: str | None, folder: str, dtype: str) -> str:
        kind = accepted(dtype, self.formats, self.package)
        if gguf is None:
            raise ValueError("OpenVINO GenAI is run from a GGUF file of the model; none was given")
        target = Path(folder) / f"{Path(gguf).stem}-{kind}.gguf"
        return str(built(target, lambda path: rewrite_gguf(Path(gguf), path, kind)))

    def load(self, path: str, dtype: str, threads: int) -> dict[str, Any]:
        import openvino
        import openvino_genai

        self.ov, self.api = openvino, openvino_genai
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self.model = openvino_genai.LLMPipeline(path, "CPU", **options)
        self.vocab = len(self.model.get_tokenizer().get_vocab())
        self.calls = 0
        return {
            "weights": accepted(dtype, self.formats, self.package),
            "compute": "float32",
            "cache": "float32",
        }

    def _generate(self, rows: Rows, n: int) -> tuple[list[list[int]], list[float]]:
        """n new tokens of each row, and the seconds of each step, the first of which is the prefill."""
        import numpy

        config = self.api.GenerationConfig(
            max_new_tokens=n, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        ids = numpy.array(rows, dtype=numpy.int64)
        inputs = self.api.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(numpy.ones_like(ids)))
        result = self.model.generate(inputs, config)
        times_ms = result.perf_metrics.raw_metrics.m_new_token_times
        first = result.perf_metrics.get_ttft().mean / 1000
        later = [(b - a) / 1000 for a, b in itertools.pairwise(times_ms)]
        return [list(row) for row in result.tokens], [first, *later]

    def prefill(self, ids: list[int]) -> float:
        # Another first token each time, else the pipeline reuses the cache of the last prompt.
        self.calls += 1
        return self._generate([[self.calls % self.vocab, *ids[1:]]], 1)[1][0]

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        steps = self._generate(rows_of(self.vocab, batch, context), new_tokens + 1)[1]
        return sum(steps[-new_tokens:]) / new_tokens

    def greedy(self, ids: list[int], n: int) -> list[int]:
        return self._generate([ids], n)[0][0]
