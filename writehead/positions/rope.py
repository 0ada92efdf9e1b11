"""Rotary positions: pairs of coordinates of queries and keys turn by an angle that grows with the position.

Paper     Su et al. 2021, "RoFormer", arXiv:2104.09864; YaRN: Peng et al. 2023, arXiv:2309.00071
Equation  (a, b) at position p -> (a cos pw - b sin pw, a sin pw + b cos pw), w_i = base^(-2i/R) for pair i
          of R/2
State     none: keys are cached turned
Cost      3 D operations a head and token
Decodes   exactly; every scaling here has the same angles at every length
Differs   "dynamic" NTK is refused: its angles depend on the length of the call, so cached keys would be stale
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.positions.base import Scheme

SCALINGS: dict[str, dict[str, float | None]] = {
    "linear": {"factor": None},
    "ntk": {"factor": None},
    "yarn": {
        "factor": None,
        "original_context": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "truncate": 1.0,
    },
    "llama3": {"factor": None, "original_context": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


class Rotary(Scheme):
    """Rotation of the first R coordinates of each query and key head."""

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        pairs: str = "half",
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the rotation.

        Args:
            head_dim: width D of a head.
            base: the angles' base.
            rotary_dim: coordinates R that turn; default all.
            pairs: "half" pairs i with i + R/2 (GPT-NeoX, Llama); "interleaved" pairs 2i with 2i + 1
                (RoFormer, GPT-J).
            scaling: {"name": "linear" | "ntk" | "yarn" | "llama3", ...} with the arguments in `SCALINGS`.

        Raises:
            ValueError: an odd or too large rotary_dim, too small a base, unknown pairs, a bad scaling.
        """
        super().__init__()
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > head_dim:
            near = max(2, min(self.rotary_dim, head_dim) // 2 * 2)
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even, at most head_dim={head_dim}; nearest is {near}"
            )
        if self.rotary_dim > 65536:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be at most 65536")
        check_choice("pairs", pairs, ("half", "interleaved"))
        if not (math.isfinite(base) and base > 1):
            raise ValueError(f"base={base} must be above 1; the usual one is 10000")
        self.pairs = pairs
        self.frequencies, self.gain = _frequencies(self.rotary_dim, base, scaling)

    def angles(self, index: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each pair's angle with the gain, (..., R/2), at positions `index` (...)."""
        angles = index.clamp_min(0).to(wide)[..., None] * self.frequencies.to(index.device, wide)
        return angles.cos() * self.gain, angles.sin() * self.gain

    def _turn(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, (B, T, 1, R): rotated = x cos + swapped(x) sin."""
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = self.angles(index[..., None], wide)
        if self.pairs == "half":
            return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
        return cos.repeat_interleave(2, -1).to(dtype), torch.stack([-sin, sin], -1).flatten(-2).to(dtype)

    def _matrix(self, pos: Positions, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The rotation of one token a row as a matrix, (B, D, D), or (1, D, D) if all stand at one position.

        A decode step turns all heads in one product; element by element it takes six small operations.
        """
        index = pos.index if pos.start is None else pos.index[:1]
        R, wide = self.rotary_dim, torch.promote_types(dtype, torch.float32)
        cos, sin = (t[:, 0, 0] for t in self._turn(index, wide))
        partner = torch.arange(R, device=index.device)
        partner = partner.roll(R // 2) if self.pairs == "half" else partner ^ 1
        matrix = torch.eye(head_dim, dtype=wide, device=index.device).repeat(len(index), 1, 1)
        matrix[:, :R, :R] = torch.diag_embed(cos)
        matrix[:, partner, torch.arange(R, device=index.device)] = sin
        return matrix.to(dtype)

    def rotate(self, heads: Tensor, pos: Positions) -> Tensor:
        T, D = heads.shape[1], heads.shape[-1]
        if T == 1:
            matrix = pos.once(self._matrix, pos, D, heads.dtype)
            if len(matrix) == 1:
                return (heads.reshape(-1, D) @ matrix[0]).view(heads.shape)
            return (heads[:, 0] @ matrix)[:, None]
        cos, sin = pos.once(self._turn, pos.index, heads.dtype)
        R = self.rotary_dim
        x = heads if heads.shape[-1] == R else heads[..., :R]
        swapped = (
            x.roll(R // 2, -1) if self.pairs == "half" else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        )
        turned = torch.addcmul(x * cos, swapped, sin)
        return turned if heads.shape[-1] == R else torch.cat([turned, heads[..., R:]], -1)


def _frequencies(R: int, base: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """The angle per position of each pair, float64, and the gain on cos and sin."""
    exponents = torch.arange(0, R, 2, dtype=torch.float64, device="cpu") / R
    plain = base**-exponents
    if scaling is None:
        return plain, 1.0
    s = _arguments(scaling)
    factor = s["factor"]
    if scaling["name"] == "linear":
        return plain / factor, 1.0
    if scaling["name"] == "ntk":
        if R < 4:
            raise ValueError(f"ntk scaling needs a rotary_dim of at least 4; got {R}")
        return (base * factor ** (R / (R - 2))) ** -exponents, 1.0
    if scaling["name"] == "llama3":
        turns = s["original_context"] * plain / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / factor * (1 - keep), 1.0
    return _yarn(R, base, plain, s)


def _yarn(R: int, base: float, plain: Tensor, s: dict[str, float]) -> tuple[Tensor, float]:
    """Slow pairs are interpolated, fast ones kept, with a ramp between the pairs that turn beta_slow and
    beta_fast times."""

    def pair_of(turns: float) -> float:
        return R * math.log(s["original_context"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(s["beta_fast"]), pair_of(s["beta_slow"])
    if s["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    ramp = ((torch.arange(R // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)).clamp(
        0, 1
    )

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0

    both = s["mscale"] and s["mscale_all_dim"]
    default = temperature(s["mscale"]) / temperature(s["mscale_all_dim"]) if both else temperature(1.0)
    return plain / s["factor"] * ramp + plain * (1 - ramp), s["attention_factor"] or default


def _arguments(scaling: Mapping[str, Any]) -> dict[str, float]:
    name = str(scaling.get("name"))
    if name == "dynamic":
        raise ValueError(
            "dynamic NTK scaling changes every angle with the length of the call, so cached keys would be "
            'stale; use {"name": "ntk", "factor": F} with a fixed factor, or none within the trained context'
        )
    check_choice("rotary scaling", name, SCALINGS)
    accepted = SCALINGS[name]
    for key in scaling:
        if key != "name":
            check_choice(f"argument of {name} scaling", key, accepted)
    values = {key: scaling.get(key, default) for key, default in accepted.items()}
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{name} scaling needs {', '.join(missing)}; got {dict(scaling)}")
    numbers = {key: _number(name, key, value, accepted[key]) for key, value in values.items()}
    if name == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise ValueError(f"llama3 scaling needs high_freq_factor above low_freq_factor; got {dict(scaling)}")
    return numbers


def _number(name: str, key: str, value: Any, default: float | None) -> float:
    """A finite number: at least 1 for the factor, at least 0 where 0 turns something off, else above 0."""
    least, zero = (1, False) if key == "factor" else (0, default == 0 or key == "truncate")
    if isinstance(value, int | float) and math.isfinite(value) and value >= least and (value or zero):
        return float(value)
    words = "of at least 1" if least else "of at least 0" if zero else "above 0"
    raise ValueError(f"{name} scaling: {key} must be a number {words}; got {value!r}")
