"""The peers' side of a worker: one class per engine, driven by lines of JSON.

Runs as a file under any interpreter that holds the engine, so it imports nothing of writehead. Every engine
decodes greedily, feeds what it decoded, and asks for the logits of the last token only.
"""

import gc
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

Rows = list[list[int]]
Scored = dict[str, list[Any]]


def rows_of(vocab: int, batch: int, context: int) -> Rows:
    """`batch` rows of `context` tokens drawn with a fixed seed; which tokens they are changes no time."""
    draw = random.Random(0)
    return [[draw.randrange(vocab) for _ in range(context)] for _ in range(batch)]


def scored(logits: Any, ids: list[int]) -> Scored:
    """The best next token after each of `ids`, and the log-probability of each but the first.

    Args:
        logits: numpy, (tokens, vocab).
        ids: the tokens.
    """
    import numpy

    wide = logits.astype(numpy.float64)
    total = numpy.log(numpy.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    own = wide[numpy.arange(len(ids) - 1), ids[1:]] - total[:-1]
    return {"best": [int(token) for token in logits.argmax(-1)], "logprobs": [float(x) for x in own]}


def built(path: Path, build: Callable[[Path], object]) -> Path:
    """`path`, made by `build(temporary path)` and renamed into place unless it exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            build(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)
    return path


def accepted(dtype: str, formats: dict[str, str], engine: str) -> str:
    """The engine's word for `dtype`."""
    if dtype not in formats:
        raise ValueError(f"dtype={dtype!r} is not offered for {engine}; offered: {', '.join(formats)}")
    return formats[dtype]


def copy_fields(reader: Any, writer: Any, changed: dict[str, int]) -> None:
    """Give a GGUF writer what a GGUF says of its model, with some values changed."""
    import gguf

    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in own:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, field.contents()), field.types[0], inner)


def rewrite_gguf(source: Path, target: Path, kind: str) -> None:
    """Write the same model with every matrix dequantised, then kept as `kind`: F32, F16, BF16, Q8_0, Q4_1."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_fields(reader, writer, {})
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(tensor.name, values)
            continue
        kept = stored
        if kind == "Q4_1" and tensor.name in ("token_embd.weight", "output.weight"):
            kept = gguf.GGMLQuantizationType.Q8_0  # 4 bits there cost a model more than they save
        writer.add_tensor(tensor.name, gguf.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_llama(
    source: Path, target: Path, *, dim: int, depth: int, heads: int, kv_heads: int, hidden: int
) -> None:
    """Write a Llama of random float32 weights with the tokenizer of another.

    Args:
        source: a GGUF of a Llama, whose tokenizer and constants are taken.
        target: the file to write.
        dim, depth, heads, kv_heads, hidden: the shape.
    """
    import gguf
    import numpy

    draw, reader = numpy.random.default_rng(0), gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    shape = {"embedding_length": dim, "block_count": depth, "feed_forward_length": hidden,
             "attention.head_count": heads, "attention.head_count_kv": kv_heads,
             "rope.dimension_count": dim // heads}  # fmt: skip
    copy_fields(reader, writer, {f"llama.{name}": value for name, value in shape.items()})
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocab, key = len(reader.fields["tokenizer.ggml.tokens"].data), dim // heads * kv_heads
    matrices = {"attn_q": (dim, dim), "attn_k": (key, dim), "attn_v": (key, dim), "attn_output": (dim, dim),
                "ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}  # fmt: skip
    named = {"token_embd": (vocab, dim)}
    named |= {f"blk.{i}.{name}": size for i in range(depth) for name, size in matrices.items()}
    for name, size in named.items():
        values = draw.standard_normal(size, dtype=numpy.float32)
        writer.add_tensor(f"{name}.weight", values * numpy.float32(size[1] ** -0.5))
    for name in ("output_norm", *(f"blk.{i}.{n}" for i in range(depth) for n in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", numpy.ones(dim, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


ENGINES: dict[str, type[Any]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
}
OPERATIONS = ("dequantise", "prepare", "load", "prefill", "decode", "greedy", "score")


def answer(engine: Any, op: str, args: dict[str, Any]) -> Any:
    """Carry out one request."""
    if op == "version":
        return importlib.metadata.version(engine.package)
    if op not in OPERATIONS or not hasattr(engine, op):
        raise ValueError(f"{engine.package} has no operation {op!r}")
    return getattr(engine, op)(**args)


def main(name: str) -> None:
    """Answer requests from stdin until "quit" or its end; whatever engines print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        engine = ENGINES[name]()
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "quit":
                break
            try:
                reply = {"ok": answer(engine, request["op"], request["args"])}
            except Exception as problem:
                text = " ".join(str(problem).split())[:500]
                reply = {"error": f"{type(problem).__name__}: {text}"}
            out.write(json.dumps(reply) + "\n")
            out.flush()
        del engine
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
