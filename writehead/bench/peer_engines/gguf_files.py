"""GGUF files for the peers: a model in other types, and one of random weights."""

from pathlib import Path
from typing import Any


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
