"""Images to learn from: arrays of NumPy files and folders of pictures, as levels in the order of a model."""

import hashlib
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from writehead.convert.errors import shown
from writehead.model.pixels import Frame
from writehead.train.batches import Batch
from writehead.train.order import Order, mix, shuffled

Bytes: TypeAlias = NDArray[np.uint8]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


class Images:
    """Images in batches, each once an epoch; without a seed they come in order, the last batch perhaps
    smaller."""

    def __init__(self, tokens: Bytes, frame: Frame, batch: int, seed: int | None) -> None:
        """Make it of the images' tokens (N, length)."""
        self.tokens, self.frame, self.batch = tokens, frame, batch
        self.order = None if seed is None else Order(len(tokens), batch, seed)
        self.count = max(1, len(tokens) // batch) if seed is not None else -(-len(tokens) // batch)

    def __call__(self, step: int) -> Batch:
        first = step * self.batch
        chosen = np.arange(first, min(first + self.batch, len(self.tokens)))
        if self.order is not None:
            chosen = self.order(step)
        target = torch.from_numpy(self.tokens[chosen].astype(np.int64))
        start = torch.full((len(target), 1), self.frame.start)
        return Batch(torch.cat([start, target[:, :-1]], 1), target)


def paths(sources: Sequence[str]) -> list[Path]:
    """The files that sources of images name.

    Raises:
        ValueError: nothing there, or a folder without images.
    """
    found: list[Path] = []
    for source in sources:
        path = _split(source)[0]
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in (*PICTURES, ".npy", ".npz") and p.is_file()
            )
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join((*PICTURES, '.npy', '.npz'))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(
                f"there is no {shown(source)}; give FILE.npz:NAME, FILE.npy, or a folder of images"
            )
    return found


def read_images(sources: Sequence[str], frame: Frame) -> Bytes:
    """All images of the sources, (N, height, width, channels).

    Args:
        sources: FILE.npz:NAME (the name may be left out if one array only holds images), FILE.npy, a
            picture, or a folder of these. Arrays are uint8, (N, height, width) or with channels behind.
        frame: what images must be.

    Raises:
        ValueError: a file that is missing, broken, or holds other images.
    """
    parts = []
    for source in sources:
        _, name = _split(source)
        for path in paths([source]):
            images = _read(path, name, frame)
            if images.ndim == 3:
                images = images[..., None]
            if images.dtype != np.uint8 or images.shape[1:] != (frame.height, frame.width, frame.channels):
                raise ValueError(
                    f"{path}: holds {images.dtype} of shape {images.shape}; expected uint8 of shape "
                    f"(N, {frame.height}, {frame.width}, {frame.channels})"
                )
            parts.append(images)
    return np.concatenate(parts)


def tokens_of(images: Bytes, frame: Frame) -> Bytes:
    """Images (N, height, width, channels) as tokens (N, length)."""
    pieces = [frame.tokens(torch.from_numpy(part)).numpy().astype(np.uint8) for part in _pieces(images)]
    return np.concatenate(pieces)


def split(images: Bytes, holdout: float, seed: int) -> tuple[Bytes, Bytes]:
    """What is learned from and what is held out.

    Raises:
        ValueError: nothing would be left.
    """
    count = max(1, round(len(images) * holdout))
    mixed = shuffled(np.arange(len(images)), len(images), mix(seed, 5))
    if count >= len(images):
        raise ValueError(f"{len(images)} images are too few to hold {holdout:.0%} out")
    return images[np.sort(mixed[count:])], images[np.sort(mixed[:count])]


def hash_of(tokens: Bytes) -> str:
    """SHA-256 of an array."""
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def _pieces(images: Bytes) -> list[Bytes]:
    return np.array_split(images, max(1, len(images) // 4096))


def _split(source: str) -> tuple[Path, str | None]:
    """A path, and the array's name behind the colon of FILE.npz:NAME."""
    path, colon, name = source.rpartition(":")
    return (Path(path), name) if colon and path.endswith(".npz") else (Path(source), None)


def _read(path: Path, name: str | None, frame: Frame) -> Bytes:
    if path.suffix.lower() in PICTURES:
        return _picture(path, frame)
    try:
        found = np.load(path)  # never of objects: NumPy refuses pickles unless told otherwise
        held = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {"": np.asarray(found)}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: is no array of NumPy: {error}") from error
    if name is None and "" not in held:
        held = {key: value for key, value in held.items() if value.ndim in (3, 4) and value.dtype == np.uint8}
        if len(held) != 1:
            raise ValueError(
                f"{path}: holds {len(held)} arrays of images ({', '.join(held) or 'none'}); name one: "
                f"{path.name}:NAME"
            )
    elif name is not None and name not in held:
        raise ValueError(f"{path}: has no array {shown(name)} (it has {', '.join(held)})")
    return held[name] if name is not None else next(iter(held.values()))


def _picture(path: Path, frame: Frame) -> Bytes:
    if find_spec("PIL") is None:
        raise ValueError(
            f"{path}: pictures need the package Pillow (pip install pillow); .npy and .npz do not"
        )
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L" if frame.channels == 1 else "RGB"))[None].reshape(
                1, image.height, image.width, frame.channels
            )
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: is no picture: {error}") from error
