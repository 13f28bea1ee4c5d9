"""Every field of the configuration classes of eight families, alone and in pairs where they interact.

The fields are transformers' own (dataclasses.fields), and keys that its code reads by getattr. A legal value
makes a model of its own; values of a wrong type or of an absurd size stand beside the base model's weights.
"""
import dataclasses
import itertools
import random
from functools import partial

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.model.foreign.judge import Case
from tests.model.foreign.models import ABSENT, BASES, opens_there, raw, same_logits, write_model

ACTIVATIONS = ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python",
               "quick_gelu", "relu", "relu2", "mish", "tanh", "linear"]
LEGAL = {
    "vocab_size": [32, 129], "hidden_size": [64, 48], "n_embd": [64], "intermediate_size": [17, 96],
    "ffn_dim": [17, 96], "n_inner": [None, 17], "num_hidden_layers": [1, 3], "n_layer": [1, 3],
    "num_attention_heads": [2, 8], "n_head": [1, 8], "num_key_value_heads": [None, 1, 4],
    "head_dim": [None, 8, 16, 6], "hidden_act": ACTIVATIONS, "activation_function": ACTIVATIONS,
    "max_position_embeddings": [16, 64, 4096], "n_positions": [16, 64], "rms_norm_eps": [1e-6, 1e-3, 1],
    "layer_norm_epsilon": [1e-6, 1e-3], "tie_word_embeddings": [True, False], "attention_bias": [True, False],
    "mlp_bias": [True, False], "initializer_range": [0.02, 0.5], "init_std": [0.1], "use_cache": [True,
        False],
    "attention_dropout": [0, 0.1], "hidden_dropout": [0.1], "dropout": [0.0, 0.2], "resid_pdrop": [0.0, 0.1],
    "embd_pdrop": [0.1], "attn_pdrop": [0.1], "layerdrop": [0.0, 0.1], "pretraining_tp": [1, 2],
    "pad_token_id": [None, 0, 3, -1], "bos_token_id": [None, 3], "eos_token_id": [None, 3, [2, 3]],
    "sliding_window": [None, 1, 7, 39, 40, 4096], "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2, 28], "layer_types": [
        None, ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]],
    "original_max_position_embeddings": [16, 40], "partial_rotary_factor": [1.0, 0.5], "rope_theta": [
        1e4, 1000000, 7.5, 5e5], "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [True, False], "reorder_and_upcast_attn": [True, False],
    "add_cross_attention": [False, True], "do_layer_norm_before": [True, False],
    "_remove_final_layer_norm": [True, False], "word_embed_proj_dim": [None, 32, 16],
    "enable_bias": [True, False], "layer_norm_elementwise_affine": [True, False],
    "apply_residual_connection_post_layernorm": [True, False], "slow_but_exact": [False, True],
    "summary_type": ["last"], "summary_use_proj": [False], "summary_activation": ["tanh"],
    "summary_proj_to_labels": [False], "summary_first_dropout": [0.0], "dtype": ["bfloat16", "float32"],
    "torch_dtype": ["float16"], "architectures": [None, ["Other"]], "transformers_version": ["4.37.0"],
    "output_hidden_states": [True], "output_attentions": [True], "return_dict": [True],
    "chunk_size_feed_forward": [0, 4], "is_encoder_decoder": [False], "id2label": [{"0": "a", "1": "b"}],
    "label2id": [{"a": 0}], "problem_type": [None, "regression"],
    # keys that no field is of, and that transformers' code reads, or that files carry
    "is_causal": [True, False], "is_decoder": [True], "attention_chunk_size": [None, 4], "n_ctx": [40],
    "n_embed": [32], "seq_length": [40], "offset_alibi": [100], "rotary_dim": [4], "qkv_bias": [True],
    "per_layer_config": [{"1": {"hidden_act": "relu"}}], "tie_last_hidden_states": [True, False],
    "quantization_config": [None, {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}],
    "auto_map": [{"AutoModelForCausalLM": "modeling_x.Model"}], "transformers_weights": ["other.safetensors"],
    "attn_implementation": ["eager", "flash_attention_2"], "_attn_implementation": ["sdpa"],
    "_name_or_path": ["x/y"], "name_or_path": ["x"], "max_length": [20], "top_p": [0.5], "temperature": [0.1],
    "num_experts": [4], "logits_soft_cap": [30.0], "attn_logit_softcapping": [50.0],
        "final_logit_softcapping":
        [30.0], "scale_embedding": [True], "residual_multiplier": [2.0], "num_labels": [3],
    "embd_layer_norm": [True], "gradient_checkpointing": [True], "rope_interleaved": [True, False],
    "rope_scaling": [None], "rope_parameters": [None, {}], "unheard_of": [1], "model_type": ["mixtral",
        "LLAMA"],
}
NEUTRAL = ("dtype", "torch_dtype", "architectures", "transformers_version", "output_hidden_states",
    "return_dict",
           "output_attentions", "problem_type", "id2label", "label2id", "is_encoder_decoder", "_name_or_path",
           "name_or_path", "max_length", "top_p", "temperature", "num_labels", "unheard_of", "auto_map")
WRONG = ["7", "x", 7.5, -1, 0, None, [], [1], {}, True, 10**12, 10**400, float("nan"), float("inf"), -0.5]
ROPES = {
    "default": {}, "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 20},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 20},
    "longrope": {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 5.0],
                 "original_max_position_embeddings": 20},
    "proportional": {"factor": 2.0}, "nonsense": {"factor": 2.0}, "mrope": {"mrope_section": [1, 1, 2]},
}
ROPE_VALUES = {
    "factor": [1.0, 3, 0.5, 2.5], "original_max_position_embeddings": [10, 40, 64, None, 20.0],
    "rope_theta": [1e4, 100, None], "attention_factor": [None, 1.5, 1, 0.0], "beta_fast": [None, 16, 4.0],
    "beta_slow": [None, 2, 0.5], "mscale": [None, 0.7, 1.0], "mscale_all_dim": [None, 0.7, 1],
    "truncate": [True, False, None], "low_freq_factor": [0.5, 4.0], "high_freq_factor": [2, 1.0],
    "partial_rotary_factor": [1.0, 0.5], "short_factor": [[1.0] * 3, [2.0] * 4, None], "finetuned": [True],
    "long_factor": [[1.0] * 4, "x"], "type": ["linear", "default"], "mrope_section": [[2, 1, 1]],
}
PAIRS = [                                    # fields that interact, with the values to be combined
    {"head_dim": [ABSENT, None, 8, 10], "num_attention_heads": [4, 2, 6], "num_key_value_heads": [
        ABSENT, None, 2, 1, 3], "hidden_size": [32, 36, 30]},
    {"sliding_window": [ABSENT, None, 6, 1], "use_sliding_window": [ABSENT, True, False],
     "max_window_layers": [ABSENT, 0, 1, 5], "layer_types": LEGAL["layer_types"] + [ABSENT,
     ["sliding_attention"]]},
    {"tie_word_embeddings": [ABSENT, True, False, None], "vocab_size": [61, 64], "hidden_size": [32, 64]},
    {"attention_bias": [ABSENT, True, False], "mlp_bias": [ABSENT, True, False], "hidden_act": ["silu",
        "gelu"],
     "num_key_value_heads": [4, 1]},
    {"sliding_window": [None, 6], "rope_scaling": [None, {"type": "linear", "factor": 2.0}],
     "max_position_embeddings": [16, 40]},
]
ABSOLUTE = [                                 # the same for GPT-2, OPT and BLOOM
    {"n_head": [1, 2, 4, 8], "n_embd": [32, 48, 30], "n_inner": [None, 20, ABSENT], "tie_word_embeddings": [
        True, False, ABSENT]},
    {"num_attention_heads": [2, 4, 6], "hidden_size": [32, 48], "ffn_dim": [20, 64], "word_embed_proj_dim": [
        ABSENT, None, 32, 48], "tie_word_embeddings": [True, False]},
    {"n_head": [1, 3, 5, 6, 7, 12], "hidden_size": [60, 84, 32], "tie_word_embeddings": [True, False]},
]
ROTARY = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def config_cases(most_of_a_group: int = 30) -> list[Case]:
    """All cases, each name once."""
    made = []
    for family in BASES:
        for draw in (_alone, _wrong, _ropes) if family in ROTARY else (_alone, _wrong):
            cases = list(draw(family))
            most = len(cases) if family == "llama" or draw is _alone else 60
            made += random.Random(family).sample(cases, min(most, len(cases)))
        made += _together(family, most_of_a_group)
    return list({case.name: case for case in made}.values())


def config_case(family: str, build: bool = True, must: bool = False, at_least: int = 0, **edits) -> Case:
    """The folder of a family's base model with some keys of config.json set."""
    spelled = ",".join(f"{key}={'ABSENT' if value is ABSENT else value}" for key, value in edits.items())
    make = partial(write_model, config=raw(family, **edits), build=build)
    return Case(f"config {family} {spelled[:140]}", make, partial(same_logits, at_least=at_least),
                opens_there if build else False, must)


def _fields(family):
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}


def _alone(family):
    fields = _fields(family)
    yield config_case(family)
    for field in sorted(fields | (set(LEGAL) if family == "llama" else set(LEGAL) - set(NEUTRAL))):
        if field in fields:
            yield config_case(family, **{field: ABSENT})
        for value in LEGAL.get(field, []):
            yield config_case(family, **{field: value})


def _wrong(family):
    for field in sorted(_fields(family) | set(BASES[family]) | {"is_causal", "attention_chunk_size"}):
        for value in WRONG[::3] if field in NEUTRAL else WRONG:
            yield config_case(family, build=False, **{field: value})


def _together(family, most):
    for at, group in enumerate(PAIRS if family in ROTARY else ABSOLUTE):
        every = list(itertools.product(*group.values()))
        for values in random.Random(f"{family}{at}").sample(every, min(most, len(every))):
            yield config_case(family, **dict(zip(group, values)))


def _ropes(family):
    """Scaled RoPE in the new spelling and both old ones, at the top, inside and on either side."""
    for kind, given in ROPES.items():
        new = {"rope_type": kind, "rope_theta": 500.0, **given}
        for edits in ({"rope_parameters": new, "rope_theta": ABSENT}, {"rope_parameters": new,
        "rope_theta": 9.0},
                      {"rope_scaling": {"rope_type": kind, **given}}, {"rope_scaling": {"type": kind,
                          **given}},
                      {"rope_scaling": {"type": kind, **given}, "rope_theta": ABSENT},
                      {"rope_scaling": {"type": kind, **given}, "rope_parameters": {"rope_type": "default",
                                                                                 "rope_theta": 100.0}},
                      {"rope_scaling": {"rope_type": kind, "type": "linear", **given}},
                      {"rope_scaling": {"type": kind, **given}, "max_position_embeddings": 20},
                      {"rope_scaling": {"type": kind, **given}, "original_max_position_embeddings": 10},
                      {"rope_scaling": {"type": kind}}, {"rope_scaling": {"full_attention": new}},
                      {"rope_parameters": {"full_attention": new, "sliding_attention": {
                          "rope_type": "default", "rope_theta": 77.0}}, "rope_theta": ABSENT}):
            yield config_case(family, **edits)
        for key, values in ROPE_VALUES.items():
            for value in values:
                yield config_case(family, rope_theta=ABSENT, rope_parameters={**new, key: value})
            for value in WRONG if family == "llama" and (key in given or key == "rope_theta") else ():
                yield config_case(family, build=False, rope_parameters={**new, key: value})
    for value in (7, "linear", [], [1], {}, True):
        for key in ("rope_scaling", "rope_parameters"):
            yield config_case(family, build=False, **{key: value})
