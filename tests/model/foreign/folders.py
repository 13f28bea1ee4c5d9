"""The models people bring: each of these must open, at every length that its configuration promises."""
from tests.model.foreign.configs import ROTARY, config_case
from tests.model.foreign.fields import ROPES
from tests.model.foreign.judge import Case
from tests.model.foreign.models import ABSENT, BASES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}


def named_cases() -> list[Case]:
    """{name: case} of folders that must open, with the longest sequence each must take."""
    cases = {
        f"{family} as it is": config_case(family, must=True, at_least=0 if family == "bloom" else 40)
        for family in BASES
    }
    cases |= {f"{family} tied": config_case(family, must=True, tie_word_embeddings=True) for family in BASES}
    cases |= {
        f"{family} window of {n}": config_case(family, must=True, at_least=40, sliding_window=n)
        for family in ("mistral", "phi3")
        for n in (None, 1, 7, 4096)
    }
    cases |= {
        f"{family} window in layers from {n}": config_case(
            family, must=True, at_least=40, use_sliding_window=True, sliding_window=7, max_window_layers=n
        )
        for family in ("qwen2", "qwen3")
        for n in (0, 1, 2)
    }
    cases |= {
        f"{family} window off": config_case(
            family, must=True, at_least=40, use_sliding_window=False, sliding_window=7, max_window_layers=0
        )
        for family in ("qwen2", "qwen3")
    }
    cases |= {
        f"{family} {name}": config_case(family, must=True, at_least=at_least, **edits)
        for family in ROTARY
        if family != "phi3"
        for name, (at_least, edits) in SCALED.items()
    }
    cases |= {
        f"{family} {name}": config_case(family, must=True, **edits)
        for name, (families, edits) in OTHERS.items()
        for family in families
    }
    return [case._replace(name=f"named {name}") for name, case in cases.items()]


def _new(kind):
    return {"rope_theta": ABSENT, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}}


SCALED = {
    "llama3": (40, {"rope_scaling": LLAMA3}),
    "llama3, spelled anew": (40, _new("llama3")),
    "linear": (80, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "linear, spelled anew": (80, _new("linear")),
    "dynamic": (80, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "dynamic, spelled anew": (80, _new("dynamic")),
    "yarn": (40, {"rope_scaling": YARN}),
    "yarn, spelled anew": (40, _new("yarn")),
    "yarn with attention factor": (40, {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16}}),
    "yarn with mscale": (40, {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}}),
}
OTHERS = {
    "with attention_bias": (("llama", "qwen3"), {"attention_bias": True}),
    "with mlp_bias": (("llama",), {"mlp_bias": True}),
    "with both biases": (("llama",), {"attention_bias": True, "mlp_bias": True}),
    "with exact gelu": (("gpt2",), {"activation_function": "gelu"}),
    "with gelu in the gate": (("llama",), {"hidden_act": "gelu"}),
    "with tanh gelu": (("llama",), {"hidden_act": "gelu_pytorch_tanh"}),
    "with relu": (("gpt2",), {"activation_function": "relu"}),
    "with gelu": (("opt",), {"activation_function": "gelu"}),
    "one key head": (ROTARY, {"num_key_value_heads": 1}),
    "with head_dim": (("llama", "mistral", "qwen3"), {"head_dim": 16}),
    "untied": (tuple(BASES), {"tie_word_embeddings": False}),
    "in bfloat16 by name": (("llama",), {"dtype": "bfloat16"}),
    "in float16 by its old name": (("llama",), {"torch_dtype": "float16"}),
    "with a list of ends": (("llama",), {"eos_token_id": [2, 3]}),
    "of another time": (
        ("llama",),
        {"transformers_version": "4.31.0", "pretraining_tp": 1, "rope_scaling": None},
    ),
}
