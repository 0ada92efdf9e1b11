"""Hugging Face transformers."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from writehead.bench.peer_engines.common import Scored, accepted, built, rows_of, scored


class Transformers:
    """Hugging Face transformers on PyTorch: a DynamicCache, in each phase the faster of eager and SDPA."""

    package = "transformers"
    formats: ClassVar = {"float32": "float32", "bfloat16": "bfloat16"}

    def dequantise(self, gguf: str, folder: str) -> str:
        """Write the model of a GGUF as a directory of float32 safetensors, unless it is there."""

        def build(target: Path) -> None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            where = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            config = read.config
            del (
                config.quantization_config
            )  # else the loaded model counts as quantised and refuses to be saved
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(**where).save_pretrained(target)

        return str(built(Path(folder) / (Path(gguf).stem + "-float32"), build))

    def prepare(self, directory: str, gguf: str | None, folder: str, dtype: str) -> str:
        accepted(dtype, self.formats, self.package)
        return directory

    def load(self, path: str, dtype: str, threads: int, attention: str = "auto") -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.key = torch, (0, 0)
        kind = getattr(torch, accepted(dtype, self.formats, self.package))
        choices = ("eager", "sdpa") if attention == "auto" else (attention,)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=kind, attn_implementation=choices[0]
        ).eval()
        self.vocab = self.model.config.vocab_size
        self.faster = {"decode": choices[0], "prefill": choices[0]}
        trials: dict[str, Callable[[], float]] = {
            "decode": lambda: self.decode(128, 1, 4),
            "prefill": lambda: self.prefill([7] * 256),
        }
        seconds: dict[str, dict[str, float]] = {}
        for phase, trial in trials.items() if len(choices) > 1 else ():
            seconds[phase] = {}
            for choice in choices:
                self.faster[phase] = choice
                seconds[phase][choice] = statistics.median(trial() for _ in range(4))
            self.faster[phase] = min(choices, key=lambda choice: seconds[phase][choice])
        return {"weights": dtype, "compute": dtype, "attention": self.faster, "tried_s": seconds}

    def _step(self, ids: Any, cache: Any) -> Any:
        with self.torch.inference_mode():
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill(self, ids: list[int]) -> float:
        self.model.set_attn_implementation(self.faster["prefill"])
        tokens, cache = self.torch.tensor([ids]), self._cache()
        start = time.perf_counter()
        self._step(tokens, cache)
        return time.perf_counter() - start

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        self.model.set_attn_implementation(self.faster["decode"])
        if self.key != (context, batch):
            self.cache = self._cache()
            self.first = self._step(self.torch.tensor(rows_of(self.vocab, batch, context)), self.cache)
            self.key = (context, batch)
        ids, start = self.first, time.perf_counter()
        for _ in range(new_tokens):
            ids = self._step(ids, self.cache)
        seconds = time.perf_counter() - start
        self.cache.crop(-new_tokens)
        return seconds / new_tokens

    def greedy(self, ids: list[int], n: int) -> list[int]:
        cache, tokens, found = self._cache(), self.torch.tensor([ids]), []
        for _ in range(n):
            tokens = self._step(tokens, cache)
            found.append(int(tokens))
        return found

    def score(self, ids: list[int]) -> Scored:
        with self.torch.inference_mode():
            logits = self.model(input_ids=self.torch.tensor([ids]), use_cache=False).logits[0]
        return scored(logits.float().numpy(), ids)
