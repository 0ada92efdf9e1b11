"""Performer: positive random features estimate the softmax kernel, so attention becomes running sums.

Paper     Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv:2009.14794
Equation  y_t = p(q_t) S_t / p(q_t).z_t, S_t = sum_{s<=t} p(k_s) v_s^T, z_t = sum_{s<=t} p(k_s);
          p(x) = exp(w_r.x' - |x'|^2 / 2) over directions w_r, x' = D^-1/4 x ("softmax", "hyperbolic" with
          both signs of each w_r), or relu(w_r.x') + 0.001 ("relu", the paper's generalised attention)
State     S with z as its last column and the log of a common factor: G (M (D + 1) + 1) values in float32,
          whatever the context; M features
Cost      whole sequence O(T M (C + D) H) in chunks of C tokens; one token O(M D H)
Decodes   exactly: a decode step is the same call with T = 1; the sums cannot rewind
Differs   keys are scaled by the running maximum of what came before, which cancels; the released codes take
          the maximum over the whole sequence and add 1e-4 or 1e-6 to features, by which the future leaks.
          Columns of the rotations get the signs that make them uniform. Directions are drawn once, saved,
          and replaced by `ops.features.redraw` only; the released codes redraw by call or by step.
          relu: scale = D^-1/2 with directions is performer-pytorch's, 1 / M Google's TensorFlow code's,
          scale = 1 without (features=None) its JAX default's
"""

from writehead.core.shapes import check_choice
from writehead.mixers.linear import TwoWay, shared_heads, smallest
from writehead.ops.features import FeatureMap, Positive, Relu
from writehead.ops.scan_chunks import Rule
from writehead.positions.base import Scheme

KERNELS = ("softmax", "hyperbolic", "relu")


class Performer(TwoWay):
    """Attention through positive random features."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        features: int | None = 256,
        kernel: str = "softmax",
        draw: str = "orthogonal",
        scale: float | None = None,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G, a divisor of H; default H.
            head_dim: width D of a head; default dim / heads.
            bias: which projections have one: "none", "qkv" or "all".
            features: random directions, which all heads share; None, for "relu" only: none are used.
            kernel: "softmax", "hyperbolic" or "relu".
            draw: "independent", "orthogonal" or "regularised" directions.
            scale: of the scores q.k; default head_dim ** -0.5.
            position: the model's position scheme.

        Raises:
            ValueError: an option that is not accepted, or a position scheme that adds to scores.
        """
        check_choice("kernel", kernel, KERNELS)
        if scale is not None and scale <= 0:
            raise ValueError(f"scale={scale} must be above 0")
        qkv = shared_heads(dim, heads, kv_heads, head_dim, bias)
        shape = (heads, qkv.kv_heads, qkv.head_dim)
        made: FeatureMap
        if kernel == "relu":
            made = Relu(*shape, features, draw, scale)
        elif features is None:
            raise ValueError(f"features=None needs kernel='relu'; kernel={kernel!r} is made of directions")
        else:
            made = Positive(*shape, features, draw, scale, hyperbolic=kernel == "hyperbolic")
        super().__init__(dim, qkv, made, Rule(smallest(), floor=True), bias, position)
