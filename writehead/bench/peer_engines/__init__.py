"""The peers' side of a worker: a class for each engine, in a file of its own; `serve.py` drives it.

Any interpreter that holds an engine runs this folder, so it imports nothing of writehead, and its files find
each other by relative imports, whatever the folder is called there. Every engine decodes greedily, feeds what
it decoded, and asks for the logits of the last token only.
"""

from typing import Any

from .ctranslate2 import CTranslate2
from .llama_cpp import LlamaCpp
from .openvino import OpenVINO
from .transformers import Transformers

ENGINES: dict[str, type[Any]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
}
