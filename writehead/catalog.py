"""The one table over all systems: a literal row each, imported when it is built."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple, TypeAlias, get_args, get_origin

from writehead.core.shapes import check_choice

Spec: TypeAlias = Mapping[str, Any]  # {"name": "mqa", "heads": 8}: a row and arguments of its constructor
NO_PRESET: Spec = MappingProxyType({})


class Row(NamedTuple):
    """One system.

    Attributes:
        name: what configs and commands call it.
        target: "module:Class" below `writehead`.
        paper: arXiv number or other source.
        family: what kind of system it is.
        cost: time of a whole sequence of T tokens.
        decodes: growth of the decode state with the context S; "encode" if it has no causal form.
        summary: one line.
        preset: arguments that make the class this system.
    """

    name: str
    target: str
    paper: str
    family: str
    cost: str
    decodes: str
    summary: str
    preset: Spec = NO_PRESET


def _table(*rows: Row) -> Mapping[str, Row]:
    return MappingProxyType({row.name: row for row in rows})


MIXERS = _table(
    Row("mha", "mixers.softmax:Softmax", "arXiv:1706.03762", "head sharing", "O(T^2)", "O(S)",
        "multi-head attention: every query head has its own key/value head"),
    Row("gqa", "mixers.softmax:Softmax", "arXiv:2305.13245", "head sharing", "O(T^2)", "O(S)",
        "grouped-query attention: kv_heads groups of query heads share a key/value head", {"kv_heads": 2}),
    Row("mqa", "mixers.softmax:Softmax", "arXiv:1911.02150", "head sharing", "O(T^2)", "O(S)",
        "multi-query attention: one write-head for all query heads", {"kv_heads": 1}),
    Row("local_mha", "mixers.softmax:Softmax", "arXiv:1911.02150", "head sharing", "O(T W)", "O(W)",
        "multi-head attention over a window that counts the query itself",
        {"pattern": {"name": "window", "window": 32}}),
    Row("local_mqa", "mixers.softmax:Softmax", "arXiv:1911.02150", "head sharing", "O(T W)", "O(W)",
        "multi-query attention over a window that counts the query itself",
        {"kv_heads": 1, "pattern": {"name": "window", "window": 32}}),
    Row("sink_mqa", "mixers.softmax:Softmax", "arXiv:2309.17453", "head sharing", "O(T W)", "O(W)",
        "multi-query attention over a window and the first tokens (attention sinks)",
        {"kv_heads": 1, "pattern": {"name": "and", "a": {"name": "causal"}, "b": {"name": "or",
         "a": {"name": "window", "window": 32}, "b": {"name": "leading", "count": 4}}}}),
    Row("bidirectional", "mixers.softmax:Softmax", "arXiv:1706.03762", "head sharing", "O(T^2)", "encode",
        "multi-head attention in which every token reads every other", {"pattern": {"name": "full"}}),
    Row("reformer", "mixers.reformer:LSH", "arXiv:2001.04451", "learned pattern", "O(T log T)", "O(1)",
        "tokens read the latest ones that locality-sensitive hashing puts into their bucket"),
    Row("reformer_mqa", "mixers.reformer:LSH", "arXiv:2001.04451", "learned pattern", "O(T log T)", "O(1)",
        "LSH attention with keys of their own, one write-head for all query heads", {"kv_heads": 1}),
    Row("routing", "mixers.routing:Routing", "arXiv:2003.05997", "learned pattern", "O(T log T)", "O(1)",
        "half of the heads read a window, the others the tokens that online k-means puts beside theirs"),
    Row("routing_mqa", "mixers.routing:Routing", "arXiv:2003.05997", "learned pattern", "O(T log T)", "O(1)",
        "routing attention with a write-head for the local and one for the routed heads", {"kv_heads": 1}),
    Row("sinkhorn", "mixers.sinkhorn:Sinkhorn", "arXiv:2002.11296", "learned pattern", "O(T^2 / W)", "O(S)",
        "blocks read themselves and a mixture of earlier blocks, sorted by a network"),
    Row("sinkhorn_mqa", "mixers.sinkhorn:Sinkhorn", "arXiv:2002.11296", "learned pattern", "O(T^2 / W)",
        "O(S)", "Sinkhorn attention with one write-head and one sorting for all heads", {"kv_heads": 1}),
    Row("clustered", "mixers.clustered:Clustered", "arXiv:2007.04825", "learned pattern", "O(T C)", "encode",
        "queries of a cluster share one row of attention, corrected at its largest keys"),
    Row("sinkhorn_mixture", "mixers.sinkhorn_mixture:SinkhornMixture", "arXiv:2002.11296", "learned pattern",
        "O(T^2)", "O(S)", "Sinkhorn heads beside heads that read everything"),
    Row("routing_running", "mixers.routing:Routing", "arXiv:2003.05997", "learned pattern", "O(T N W)",
        "O(1)", "routing attention whose centroids pick the best tokens so far", {"mode": "running"}),
    Row("cluster_former", "mixers.cluster_former:ClusterFormer", "arXiv:2009.06097", "learned pattern",
        "O(T W)", "encode", "windows of the tokens sorted by the cluster of their hidden state"),
    Row("linear", "mixers.linear:Linear", "arXiv:2006.16236", "kernel", "O(T)", "O(1)",
        "linear attention: elu(x) + 1 in place of the softmax, running sums in place of a cache"),
    Row("performer", "mixers.performer:Performer", "arXiv:2009.14794", "kernel", "O(T)", "O(1)",
        "positive orthogonal random features (FAVOR+) estimate the softmax kernel"),
    Row("performer_relu", "mixers.performer:Performer", "arXiv:2009.14794", "kernel", "O(T)", "O(1)",
        "Performer's generalised attention: relu of random projections", {"kernel": "relu"}),
    Row("rfa", "mixers.rfa:RFA", "arXiv:2103.02143", "kernel", "O(T)", "O(1)",
        "random Fourier features of queries and keys of length 1"),
    Row("rfa_gate", "mixers.rfa:GatedRFA", "arXiv:2103.02143", "kernel", "O(T)", "O(1)",
        "random feature attention with a forget gate"),
    Row("sparse_strided", "mixers.sparse_transformer:SparseTransformer", "arXiv:1904.10509", "fixed pattern",
        "O(T sqrt T)", "O(S)", "a window and every stride-th key before it (images, music)",
        {"kind": "strided", "stride": 128}),
    Row("sparse_fixed", "mixers.sparse_transformer:SparseTransformer", "arXiv:1904.10509", "fixed pattern",
        "O(T sqrt T)", "O(S/W)", "the own block and the last columns of the blocks before it (text)",
        {"kind": "fixed", "stride": 128, "columns": 32}),
    Row("block_bert", "mixers.block_bert:BlockBERT", "arXiv:1911.02972", "fixed pattern", "O(T^2/N)",
        "encode", "each head reads one of N blocks for every block of queries", {"blocks": 2}),
    Row("block_causal", "mixers.block_bert:BlockBERT", "arXiv:1911.02972", "fixed pattern", "O(T W)", "O(W)",
        "BlockBERT looking back: each head reads its block or one at a fixed distance before it",
        {"blocks": 3, "block": 128}),
    Row("image_1d", "mixers.image_transformer:ImageTransformer1D", "arXiv:1802.05751", "fixed pattern",
        "O(T W)", "O(W)", "blocks of pixels along the raster read themselves and some pixels before",
        {"block": 256, "memory": 256}),
    Row("image_2d", "mixers.image_transformer:ImageTransformer2D", "arXiv:1802.05751", "fixed pattern",
        "O(T W)", "O(W)", "blocks of pixels read themselves and what lies above and beside them",
        {"image_width": 32, "patch": [8, 8], "margin": [8, 8]}),
    Row("big_bird", "mixers.big_bird:BigBird", "arXiv:2007.14062", "fixed pattern", "O(T W)", "encode",
        "a window of blocks, two global blocks and random blocks", {"block": 64, "random": 3}),
    Row("big_bird_causal", "mixers.big_bird:BigBird", "arXiv:2007.14062", "fixed pattern", "O(T W)", "O(S)",
        "Big Bird looking back: the first block, a window of blocks and random earlier blocks",
        {"block": 64, "random": 3, "causal": True}),
    Row("axial", "mixers.axial:Axial", "arXiv:1912.12180", "fixed pattern", "O(T sqrt T)", "encode",
        "pixels read their column (axis 0) or their row (axis 1) of an image", {"image_width": 32}),
    Row("axial_causal", "mixers.axial:Axial", "arXiv:1912.12180", "fixed pattern", "O(T sqrt T)", "O(S)",
        "axial attention that reads no later pixel", {"image_width": 32, "causal": True}),
    Row("longformer", "mixers.longformer:Longformer", "arXiv:2004.05150", "fixed pattern", "O(T W)", "encode",
        "a window on both sides and global tokens with projections of their own", {"window": 512}),
    Row("longformer_causal", "mixers.longformer:Longformer", "arXiv:2004.05150", "fixed pattern", "O(T W)",
        "O(W)", "Longformer looking back: a window, with gaps for some heads, and the first tokens",
        {"window": 512, "causal": True}),
    Row("etc", "mixers.etc:ETC", "arXiv:2004.08483", "fixed pattern", "O(T W)", "encode",
        "global tokens read all, long ones a window and them; every pair has a relative label"),
    Row("cross", "mixers.cross:Cross", "arXiv:1706.03762", "head sharing", "O(T S)", "O(1)",
        "decoder tokens read an encoder's output, kept once for each source"),
    Row("transformer_xl", "mixers.transformer_xl:TransformerXL", "arXiv:1901.02860", "recurrence", "O(T W)",
        "O(W)", "a segment reads itself and the hidden states before it, by relative positions"),
    Row("sliding_xl", "mixers.transformer_xl:TransformerXL", "arXiv:1901.02860", "recurrence",
        "O(T W)", "O(W)", "every query reads the last `memory` keys, by relative positions",
        {"segment": None}),
    Row("compressive", "mixers.compressive:Compressive", "arXiv:1911.05507", "recurrence", "O(T W)", "O(W)",
        "Transformer-XL whose oldest memories are compressed and kept for longer"),
    Row("most_used", "mixers.most_used:MostUsed", "arXiv:1911.05507", "recurrence", "O(T W)", "O(W)",
        "Transformer-XL that keeps, of what leaves its memory, the tokens that were read most"),
    Row("long_short", "mixers.long_short:LongShort", "arXiv:2107.02192", "low rank", "O(T^2 / C)",
        "O(S)", "a window of tokens and a few summaries of every earlier chunk, in one softmax"),
    Row("linformer", "mixers.linformer:Linformer", "arXiv:2006.04768", "low rank", "O(T R)", "encode",
        "keys and values are projected along the sequence to R slots"),
    Row("linformer_prefix", "mixers.linformer_prefix:LinformerPrefix", "arXiv:2006.04768", "low rank",
        "O(T R)", "O(1)", "keys and values of the past summed into R slots, by learned weights of positions"),
    Row("nystromformer", "mixers.nystromformer:Nystromformer", "arXiv:2102.03902", "low rank", "O(T M)",
        "encode", "the attention matrix from its rows and columns at M landmarks"),
    Row("synthesizer_dense", "mixers.synthesizer:Synthesizer", "arXiv:2005.00743", "low rank", "O(T^2)",
        "O(S)", "scores from the query alone, by a small network", {"members": ("dense",)}),
    Row("synthesizer_random", "mixers.synthesizer:Synthesizer", "arXiv:2005.00743", "low rank", "O(T^2)",
        "O(S)", "learned scores between positions, whatever the tokens", {"members": ("random",)}),
    Row("factorised_dense", "mixers.synthesizer:Synthesizer", "arXiv:2005.00743", "low rank",
        "O(T^2)", "O(S)", "scores from the query as products of two factors",
        {"members": ("factorised_dense",)}),
    Row("factorised_random", "mixers.synthesizer:Synthesizer", "arXiv:2005.00743", "low rank",
        "O(T^2)", "O(S)", "learned scores between positions, of low rank",
        {"members": ("factorised_random",)}),
    Row("synthesizer_mixed", "mixers.synthesizer:Synthesizer", "arXiv:2005.00743", "low rank", "O(T^2)",
        "O(S)", "learned scores mixed with those of queries and keys", {"members": ("random", "dot")}),
    Row("luna", "mixers.luna:Luna", "arXiv:2106.01540", "low rank", "O(T M)", "O(1)",
        "M learned slots sum up the past, and queries read them"),
    Row("luna_encoder", "mixers.luna:LunaEncoder", "arXiv:2106.01540", "low rank", "O(T M)", "encode",
        "M slots pack the sequence, are read by it and go to the next layer"),
    Row("long_short_encoder", "mixers.long_short:LongShortEncoder", "arXiv:2107.02192", "low rank",
        "O(T (W + R))", "encode", "a window on both sides and R summaries of the whole sequence"),
)  # fmt: skip

FEEDFORWARDS = _table(
    Row("dense", "feedforward.dense:Dense", "arXiv:1706.03762", "feed-forward", "O(T)", "O(1)",
        "two matrices and a nonlinearity, plain or gated"),
    Row("chunked", "feedforward.dense:Chunked", "arXiv:2001.04451", "feed-forward", "O(T)", "O(1)",
        "the dense layer over pieces of the sequence: equal results in bounded memory"),
)  # fmt: skip

POSITIONS = _table(
    Row("none", "positions.base:NoPosition", "arXiv:2203.16634", "position", "O(1)", "O(1)",
        "no position; a causal model can still tell order"),
    Row("sinusoidal", "positions.sinusoidal:Sinusoidal", "arXiv:1706.03762", "position", "O(T)", "O(1)",
        "fixed waves added to the embeddings"),
    Row("infused", "positions.sinusoidal:PositionInfused", "arXiv:2012.15832", "position", "O(T)", "O(1)",
        "fixed waves added to what queries and keys are made of, never to values"),
    Row("learned", "positions.learned:Learned", "arXiv:1705.03122", "position", "O(T)", "O(1)",
        "a trained vector for each position, up to a limit"),
    Row("axial", "positions.axial:Axial", "arXiv:2001.04451", "position", "O(T)", "O(1)",
        "trained vectors put together from a small table for each axis of a grid of positions"),
    Row("grid", "positions.grid:Grid", "arXiv:1904.10509", "position", "O(T)", "O(1)",
        "trained vectors of an image's rows, columns and channels, added up"),
    Row("rotary", "positions.rope:Rotary", "arXiv:2104.09864", "position", "O(T)", "O(1)",
        "pairs of query and key coordinates turn with the position"),
    Row("alibi", "positions.alibi:ALiBi", "arXiv:2108.12409", "position", "O(T S)", "O(1)",
        "a penalty on distance, with a slope for each head"),
    Row("t5", "positions.t5:T5Bias", "arXiv:1910.10683", "position", "O(T S)", "O(1)",
        "a learned bias for each bucket of distances"),
)  # fmt: skip

STACKS = _table(
    Row("residual", "stacks.residual:Residual", "arXiv:1706.03762", "stack", "O(depth)", "O(depth)",
        "pre-norm, post-norm or parallel residual blocks"),
    Row("reversible", "stacks.reversible:Reversible", "arXiv:2001.04451", "stack", "O(depth)", "O(depth)",
        "two streams from which inputs are found again: training memory does not grow with depth"),
    Row("axial_decoders", "stacks.axial:Axial", "arXiv:1912.12180", "stack", "O(T sqrt T)", "O(S)",
        "images: an outer decoder over whole rows, an inner one along the row at hand",
        {"image_width": 32}),
)  # fmt: skip

PIXELS = _table(
    Row("categorical", "model.pixels:Categorical", "arXiv:1802.05751", "pixels", "O(T)", "O(1)",
        "images: an embedding for each level of each channel, logits over the levels"),
    Row("logistics", "model.pixels:Logistics", "arXiv:1701.05517", "pixels", "O(T)", "O(1)",
        "images: the levels' probabilities from a mixture of logistic distributions"),
)  # fmt: skip


def build(table: Mapping[str, Row], spec: Spec, **context: Any) -> Any:
    """Make what a spec describes.

    Args:
        table: MIXERS, FEEDFORWARDS, POSITIONS, STACKS or PIXELS.
        spec: the row's name and arguments of its constructor, which go over the row's preset.
        context: arguments that the caller supplies (dim, heads, position, ...); those that the
            constructor does not take are left out.

    Raises:
        ValueError: an unknown name or argument (with the nearest and all accepted), an argument that the
        caller of
            `build` supplies itself, or a missing one.
    """
    row = find(table, spec)
    target = load(row)
    parameters = inspect.signature(target).parameters
    given = {key: value for key, value in spec.items() if key != "name"}
    for key in given:
        if key not in parameters or key in context:
            accepted = sorted(set(parameters) - set(context))
            near = get_close_matches(str(key), accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{row.name} takes no argument {str(key)!r}{hint} (accepted: {', '.join(accepted) or 'none'})"
            )
    for key, value in given.items():
        _check_type(f"{row.name}: {key}", value, parameters[key].annotation)
    arguments = {**row.preset, **given, **{key: v for key, v in context.items() if key in parameters}}
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f"{row.name} needs {', '.join(missing)}; got {dict(spec)}")
    return target(**arguments)


def load(row: Row) -> Any:
    """The row's class, imported now."""
    module, _, name = row.target.partition(":")
    return getattr(import_module(f"writehead.{module}"), name)


def argument(table: Mapping[str, Row], spec: Spec, key: str) -> Any:
    """The value that `build` would give the constructor's argument `key`, or None if it takes none.

    Raises:
        ValueError: an unknown row, or a value of a wrong type.
    """
    row = find(table, spec)
    parameters = inspect.signature(load(row)).parameters
    if key not in parameters:
        return None
    default = parameters[key].default
    if key in spec:
        _check_type(f"{row.name}: {key}", spec[key], parameters[key].annotation)
        return spec[key]
    return row.preset.get(key, None if default is inspect.Parameter.empty else default)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Raise if an annotation (int, float | None, list[float], Mapping[str, Any] | None, ...) rules the value
    out; what is inside lists and mappings is the constructor's affair."""
    union = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = tuple(get_origin(kind) or kind for kind in union)
    if not all(isinstance(kind, type) for kind in kinds) or (isinstance(value, bool) and bool in kinds):
        return
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or isinstance(value, bool):
        words = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {words}; got {value!r}")


def find(table: Mapping[str, Row], spec: Spec | str) -> Row:
    """The row that a spec or a name speaks of.

    Raises:
        ValueError: no such row.
    """
    name = spec if isinstance(spec, str) else spec.get("name")
    if not isinstance(name, str):
        raise ValueError(f"a spec needs a name; got {spec!r} (accepted: {', '.join(sorted(table))})")
    family = next(iter(table.values())).family
    check_choice(f"name ({family})" if table is not MIXERS else "system", name, table)
    return table[name]
