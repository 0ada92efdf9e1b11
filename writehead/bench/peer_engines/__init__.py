"""The peers' side of a worker: a class for each engine, in a file of its own; `serve.py` drives it.

Any interpreter that holds an engine runs this folder, so it imports nothing else of writehead. Every engine
decodes greedily, feeds what it decoded, and asks for the logits of the last token only.
"""

from typing import Any

from writehead.bench.peer_engines.ctranslate2 import CTranslate2
from writehead.bench.peer_engines.llama_cpp import LlamaCpp
from writehead.bench.peer_engines.openvino import OpenVINO
from writehead.bench.peer_engines.transformers import Transformers

ENGINES: dict[str, type[Any]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
}
