"""ModelConfig: strict to and from plain values, JSON and YAML; what cannot be built ends in one sentence."""

import copy
import json

import pytest
import yaml
from config_seeds import ENCODER, SEEDS, SMALL
from hypothesis import given
from hypothesis import strategies as st

from writehead.config import ModelConfig
from writehead.model.blank import KINDS


@pytest.mark.parametrize("values", SEEDS, ids=range(len(SEEDS)))
def test_a_config_survives_plain_values_json_and_yaml_and_builds(values, tmp_path):
    config = ModelConfig.from_dict(copy.deepcopy(values))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert ModelConfig.read(tmp_path / "c.json") == ModelConfig.read(tmp_path / "c.yaml") == config
    assert KINDS[config.kind](config).config is config


def test_plain_values_carry_a_version_and_leave_defaults_out():
    assert ModelConfig(**SMALL).to_dict() == {"writehead": 1, **SMALL}
    assert ModelConfig(**SMALL, max_context=9).to_dict() == {"writehead": 1, **SMALL, "max_context": 9}


@given(
    st.integers(1, 10**6),
    st.integers(1, 4096),
    st.integers(1, 99),
    st.booleans(),
    st.floats(-1e6, 1e6),
    st.none() | st.integers(1, 10**9),
    st.lists(st.sampled_from([{"name": "mha"}, {"name": "mqa", "heads": 2}]), min_size=1, max_size=3),
)
def test_any_config_survives_its_own_plain_values(vocab, dim, depth, flag, scale, context, mixers):
    config = ModelConfig(
        vocab=vocab,
        dim=dim,
        depth=depth,
        tie_embeddings=flag,
        embed_scale=scale,
        max_context=context,
        mixer=tuple(mixers),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [config.layer("mixer", i) for i in range(4)] == [mixers[i % len(mixers)] for i in range(4)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab": 3, "dim": 4}, "config lacks depth; got vocab, dim"),
        ({}, "config lacks vocab, dim, depth; got nothing"),
        (["vocab"], "a config is a mapping of keys to values; got list"),
        ({**SMALL, "mixr": {"name": "mqa"}}, r"unknown config key 'mixr'; did you mean 'mixer'\?"),
        ({**SMALL, 5: 1}, "unknown config key '5'"),
        ({**SMALL, "writehead": 2}, "config version 2 is not supported; this writehead reads version 1"),
        ({**SMALL, "vocab": 0}, "vocab=0 must be a whole number of at least 1"),
        ({**SMALL, "dim": "16"}, "dim='16' must be a whole number of at least 1"),
        ({**SMALL, "depth": True}, "depth=True must be a whole number of at least 1"),
        ({**SMALL, "depth": 2.0}, "depth=2.0 must be a whole number"),
        ({**SMALL, "vocab": 10**12}, r"vocab=1000000000000 .* at most 2147483648"),
        ({**SMALL, "dim": 10**9}, r"dim=1000000000 .* at most 1048576"),
        ({**SMALL, "depth": 10**9}, r"depth=1000000000 .* at most 8192"),
        ({**SMALL, "kind": "decode"}, "unknown kind 'decode'; did you mean 'decoder'"),
        ({**SMALL, "kind": 3}, "kind must be str; got 3"),
        ({**SMALL, "mixer": []}, "mixer is an empty list; give one spec or several that tile over depth"),
        ({**SMALL, "mixer": "mqa"}, r"mixer must be a spec such as \{'name': ...\}; got 'mqa'"),
        ({**SMALL, "mixer": [{"heads": 4}]}, r"mixer must be a spec such as .*; got \{'heads': 4\}"),
        ({**SMALL, "stack": None}, "stack must be a spec such as"),
        ({**SMALL, "tie_embeddings": 1}, "tie_embeddings must be bool; got 1"),
        ({**SMALL, "embed_scale": "4"}, "embed_scale must be float or int; got '4'"),
        ({**SMALL, "embed_scale": True}, "embed_scale must be float or int; got True"),
        ({**SMALL, "logit_scale": float("nan")}, "logit_scale=nan must be a finite number"),
        ({**SMALL, "max_context": 1.5}, "max_context must be int or nothing; got 1.5"),
        ({**SMALL, "max_context": 0}, "max_context=0 must be at least 1"),
        ({**SMALL, "embed_norm_last": True}, "embed_norm_last=True .* but embed_norm=False leaves it out"),
        ({**SMALL, "token_types": -1}, "token_types=-1 must be from 0 to 2147483648"),
        ({**SMALL, "head_transform": 3}, "head_transform must be str or nothing; got 3"),
        ({**SMALL, "encoder": 7}, "encoder must be Mapping or nothing; got 7"),
        (
            {**SMALL, "kind": "seq2seq"},
            "kind='seq2seq': cross and encoder belong to a seq2seq model, which needs both",
        ),
        (
            {**SMALL, "cross": {"name": "cross"}},
            "kind='decoder': cross and encoder belong to a seq2seq model",
        ),
        (
            {**SMALL, "kind": "seq2seq", "cross": {"name": "cross"}, "encoder": {**ENCODER, "dim": 32}},
            "encoder must be of kind 'encoder' and dim=16; got kind='encoder', dim=32",
        ),
        (
            {**SMALL, "kind": "seq2seq", "cross": {"name": "cross"}, "encoder": SMALL},
            "encoder must be of kind 'encoder' and dim=16; got kind='decoder'",
        ),
        (
            {**SMALL, "kind": "seq2seq", "cross": {"name": "cross"}, "encoder": {"dim": 3}},
            "config lacks vocab, depth",
        ),
    ],
)
def test_what_from_dict_refuses_it_says(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": {"name": "mqq"}}, r"unknown system 'mqq'; did you mean 'mqa'\?"),
        ({"mixer": {"name": "mqa", "head": 4}}, r"mqa takes no argument 'head'; did you mean 'heads'\?"),
        ({"mixer": {"name": "mqa", 4: 4}}, "mqa takes no argument '4'"),
        ({"mixer": {"name": "mqa", "dim": 4}}, "mqa takes no argument 'dim'"),
        ({"mixer": {"name": "mqa", "heads": "4"}}, "mqa: heads must be int; got '4'"),
        (
            {"mixer": {"name": "mqa", "heads": 3}},
            "dim=16 must be a positive multiple of heads=3; nearest is 15",
        ),
        ({"mixer": {"name": "mqa", "qk_norm": True}}, "mqa: qk_norm must be float or nothing; got True"),
        (
            {"mixer": {"name": "mqa", "pattern": "causal"}},
            "mqa: pattern must be .*; got 'causal'|a pattern is a mapping",
        ),
        ({"mixer": {"name": "mqa", "pattern": {"name": "window"}}}, "pattern 'window' needs window"),
        (
            {"mixer": {"name": "bidirectional", "heads": 4}},
            "'bidirectional' reads tokens after the query, so it cannot decode",
        ),
        (
            {"mixer": {"name": "cross"}},
            "cross-attention reads an encoder: give it as `cross` of a seq2seq config",
        ),
        ({"feedforward": {"name": "dnse"}}, r"unknown name \(feed-forward\) 'dnse'; did you mean 'dense'"),
        ({"feedforward": {"name": "dense", "hidden": 0}}, "hidden=0 must be at least 1"),
        ({"feedforward": {"name": "chunked", "chunk": 0}}, "chunk=0 must be at least 1"),
        (
            {"feedforward": {"name": "dense", "activation": "gelu2"}},
            "unknown activation 'gelu2'; did you mean 'gelu'",
        ),
        ({"head_transform": "gelu2"}, "unknown head_transform 'gelu2'; did you mean 'gelu'"),
        ({"position": {"name": "learned"}}, "learned needs max_context"),
        ({"position": {"name": "rope"}}, r"unknown name \(position\) 'rope'"),
        ({"position": {"name": "rotary", "scaling": 3}}, "rotary: scaling must be"),
        ({"position": {"name": "alibi", "slopes_of_heads": 3}}, "alibi: slopes_of_heads must be"),
        ({"position": {"name": "alibi", "slopes_of_heads": ["a"] * 8}}, "slopes_of_heads"),
        ({"position": {"name": "alibi", "heads": 3}}, "alibi takes no argument 'heads'"),
        (
            {
                "position": {"name": "alibi"},
                "mixer": ({"name": "mqa", "heads": 4}, {"name": "mqa", "heads": 2}),
            },
            r"alibi positions need one heads for all layers; the mixers have 2, 4",
        ),
        (
            {
                "position": {"name": "rotary"},
                "mixer": ({"name": "mqa", "heads": 4}, {"name": "mqa", "heads": 2}),
            },
            r"rotary positions need one head_dim for all layers; the mixers have 4, 8",
        ),
        (
            {"position": {"name": "rotary"}, "mixer": {"name": "mqa", "heads": 16}},
            "rotary_dim=1 must be even",
        ),
        (
            {"kind": "encoder", "position": {"name": "none"}},
            "an encoder without positions cannot tell the order",
        ),
        ({"kind": "encoder", "mixer": {"name": "cross"}, "position": {"name": "t5"}}, "cross"),
        ({"stack": {"name": "residual", "order": "before"}}, "unknown order 'before'"),
        (
            {"stack": {"name": "residual", "one_norm": True}},
            r'one_norm=True needs order="parallel"; got order=\'pre\'',
        ),
        ({"stack": {"name": "residual", "norm": "rsm"}}, "unknown norm 'rsm'; did you mean 'rms'"),
        ({"stack": {"name": "residual", "dropout": 1.0}}, "dropout=1.0 must be from 0 up to 1"),
        ({"stack": {"name": "residual", "eps": -1e-6}}, "eps=-1e-06 must be from 0 up to 1"),
        ({"stack": {"name": "residual", "layers": []}}, "residual takes no argument 'layers'"),
        (
            {
                "kind": "seq2seq",
                "cross": {"name": "cross"},
                "stack": {"name": "residual", "order": "parallel"},
                "encoder": ModelConfig.from_dict(ENCODER),
            },
            'a decoder with cross-attention needs order="pre" or "post"; got "parallel"',
        ),
    ],
)
def test_combinations_that_cannot_work_end_at_construction_with_a_sentence(changes, message):
    config = ModelConfig(**{**SMALL, "position": {"name": "none"}, **changes})
    with pytest.raises(ValueError, match=message):
        KINDS[config.kind](config)


def test_a_model_of_another_kind_is_refused_by_name():
    decoder, encoder = ModelConfig(**SMALL), ModelConfig.from_dict(ENCODER)
    for kind, config, message in (
        ("decoder", encoder, "this config describes an encoder; build it with Encoder"),
        ("encoder", decoder, "this config describes a decoder; Encoder builds encoders"),
        ("seq2seq", decoder, "this config describes a decoder; Seq2Seq builds seq2seq models"),
    ):
        with pytest.raises(ValueError, match=message):
            KINDS[kind](config)


@pytest.mark.parametrize("text", ["{", '{"vocab": 3,}', "[1, 2]", "", "null", '{"a": ' * 2000, "a: [b"])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_that_is_no_config_is_named(text, suffix, tmp_path):
    path = tmp_path / f"broken.{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.{suffix}: "):
        ModelConfig.read(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ValueError, match=r"broken\.json: "):
        ModelConfig.read(path)


def test_yaml_makes_no_python_objects(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="could not determine a constructor for the tag"):
        ModelConfig.read(path)
