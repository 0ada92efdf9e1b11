"""Configs of every kind, from which the tests of ModelConfig start."""

SMALL = {"vocab": 11, "dim": 16, "depth": 2}
ENCODER = {
    **SMALL,
    "kind": "encoder",
    "mixer": {"name": "bidirectional", "heads": 4},
    "position": {"name": "sinusoidal"},
}
SEEDS = [
    {**SMALL, "mixer": {"name": "gqa", "heads": 4, "kv_heads": 2, "bias": "qkv"}, "max_context": 64},
    {
        **SMALL,
        "mixer": [{"name": "mqa", "heads": 4}, {"name": "local_mqa", "heads": 4}],
        "position": {"name": "rotary", "base": 5e5, "scaling": {"name": "linear", "factor": 2.0}},
        "feedforward": {"name": "dense", "hidden": 24, "gated": True, "activation": "silu"},
        "stack": {"name": "residual", "order": "parallel", "one_norm": True},
    },
    {
        **SMALL,
        "position": {"name": "alibi"},
        "tie_embeddings": False,
        "head_bias": True,
        "embed_norm": True,
        "mixer": {
            "name": "mha",
            "heads": 4,
            "pattern": {
                "name": "and",
                "a": {"name": "causal"},
                "b": {
                    "name": "per_head",
                    "patterns": [{"name": "window", "window": 3}] * 3 + [{"name": "full"}],
                },
            },
        },
    },
    {**SMALL, "position": {"name": "learned", "max_context": 9}, "embed_scale": 4.0, "logit_scale": 0.25},
    ENCODER,
    {
        **ENCODER,
        "embed_norm": True,
        "embed_norm_last": True,
        "token_types": 2,
        "head_transform": "gelu",
    },
    {
        **SMALL,
        "kind": "seq2seq",
        "encoder": {**ENCODER, "position": {"name": "t5"}},
        "position": {"name": "t5"},
        "cross": {"name": "cross", "heads": 4},
        "feedforward": {"name": "chunked", "chunk": 3},
    },
]
