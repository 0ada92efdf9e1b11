"""CTranslate2."""

import json
import time
from pathlib import Path
from typing import Any, ClassVar

from writehead.bench.peer_engines.common import Rows, Scored, accepted, built, rows_of, scored


class CTranslate2:
    """CTranslate2's generator; a step's time is the distance of its callbacks, so prefill is left out."""

    package = "ctranslate2"
    formats: ClassVar = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}

    def prepare(self, directory: str, gguf: str | None, folder: str, dtype: str) -> str:
        kind = accepted(dtype, self.formats, self.package)

        def build(target: Path) -> None:
            from ctranslate2.converters import TransformersConverter

            TransformersConverter(directory).convert(str(target), quantization=kind)

        return str(built(Path(folder) / f"ctranslate2-{kind}", build))

    def load(self, path: str, dtype: str, threads: int) -> dict[str, Any]:
        import ctranslate2

        kind, supported = self.formats[dtype], ctranslate2.get_supported_compute_types("cpu")
        if kind not in supported:  # it would silently compute in another type
            raise ValueError(
                f"CTranslate2 has no {kind} on this processor, only {', '.join(sorted(supported))}"
            )
        self.model = ctranslate2.Generator(
            path, device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )
        self.tokens = json.loads((Path(path) / "vocabulary.json").read_text())
        return {"weights": kind, "compute": self.model.compute_type}

    def _generate(self, rows: Rows, n: int) -> tuple[list[list[int]], list[float]]:
        """n new tokens of each row, and when each step was done, counted from the call."""
        done: dict[int, float] = {}

        def seen(step: Any) -> bool:
            done.setdefault(step.step, time.perf_counter())
            return False

        start = time.perf_counter()
        results = self.model.generate_batch(
            [[self.tokens[token] for token in row] for row in rows],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=seen,
        )
        return [result.sequences_ids[0] for result in results], [done[step] - start for step in sorted(done)]

    def prefill(self, ids: list[int]) -> float:
        return self._generate([ids], 1)[1][0]

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        _, done = self._generate(rows_of(len(self.tokens), batch, context), new_tokens + 1)
        if len(done) != new_tokens + 1:
            raise RuntimeError(f"CTranslate2 made {len(done)} steps instead of {new_tokens + 1}")
        return (done[-1] - done[0]) / new_tokens

    def greedy(self, ids: list[int], n: int) -> list[int]:
        return self._generate([ids], n)[0][0]

    def score(self, ids: list[int]) -> Scored:
        import numpy

        return scored(numpy.asarray(self.model.forward_batch([ids]))[0], ids)
