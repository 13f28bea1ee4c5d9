"""config.json as transformers means it: what changes the maths is honoured or refused, both ways."""
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.model.weights.hugging_face.config import model_config_from_hf, model_config_to_hf
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.model.weights.hugging_face.rope_config import rope_from_hf
from tests.model.twins import CONFIGS, SIZES, difference, theirs

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
OTHERS = {                                   # what makes a family another model, and the fields that say so
    "gpt2 exact gelu": ("gpt2", {"activation_function": "gelu"}, {"activation": "gelu"}),
    "gpt2 wide": ("gpt2", {"n_inner": None}, {"hidden": 120}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
                     {"attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1.7, "rope_theta": 500.0}},
               {"context": 62, "rope_scaling": RopeScaling("linear", 1.7)}),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
                {"context": 74, "rope_scaling": RopeScaling("dynamic", 2.0, 37)}),
    "yarn": ("qwen3", {"rope_parameters": YARN}, {"context": 48}),
    "yarn in full": ("mistral", {"rope_parameters": YARN | {
        "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8, "truncate": False}}, {"window": 11}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, {"context": 37, "rope_scaling": RopeScaling(
        "llama3", 8.0, 16)}),
    "old keys": ("llama", {"rope_parameters": None, "rope_theta": 300.0,
                           "original_max_position_embeddings": 9,
                           "rope_scaling": {"type": "yarn", "factor": 2.0}}, {"theta": 300.0}),
    "old keys beside new": ("llama", {"rope_theta": 300.0}, {"theta": 500.0}),
    "qwen3 window": ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2,
                               "attention_bias": True}, {"window": 7, "full_layers": 2}),
    "qwen2 by layer_types": ("qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
                             {"window": 9, "full_layers": 2}),
    "qwen2 head_dim": ("qwen2", {"head_dim": 8, "hidden_size": 35}, {"head_dim": 8, "width": 35}),
    "opt bare": ("opt", {"enable_bias": False, "activation_function": "gelu"},
                 {"attention_bias": False, "mlp_bias": False}),
}


@pytest.mark.parametrize("family, changes, said", OTHERS.values(), ids=OTHERS)
def test_what_changes_the_maths_is_read_and_written(tmp_path, family, changes, said):
    """As long as the model is made for: past the windows' borders and the scalings' first lengths."""
    other = theirs(family, tied=False, **changes)
    other.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(written | changes))      # as they stand there
    model = load_hf_model(tmp_path / "theirs")
    assert {name: getattr(model.config, name) for name in said} == said
    length = model.config.context
    assert difference(model, other, length) <= 1e-4
    save_hf_model(model, tmp_path / "ours")
    assert load_hf_model(tmp_path / "ours").config == model.config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert difference(model, again, length) <= 1e-4


def refused(family, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_config_from_hf({"model_type": family, **CONFIGS[family], **change}, "h")
    assert str(caught.value).startswith("h: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("family, change, message", [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba' is unknown; known are gpt2, llama, mistral"),
    ("llama", {"model_type": ["llama"]}, "is unknown"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', but this decoder has only silu"),
    ("llama", {"num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
    ("llama", {"hidden_size": 35}, "not a multiple of the number of attention"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is '-1e-05', which must be a number more than 0"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
    ("llama", {"rms_norm_eps": "x"}, "transformers does not read it: .*expected float, got str"),
    ("llama", {"tie_word_embeddings": None}, "expected bool, got NoneType"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True, but this decoder has only False"),
    ("llama", {"pad_token_id": 101}, "pad_token_id is 101, which is no token of 101"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, which must be a whole number"),
    ("qwen2", {"layer_types": ["sliding_attention"] + ["full_attention"] * 2}, "layers with a window follow"),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "is not set"),
    ("gpt2", {"n_head": 4}, "4 heads do not divide the width of 30"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, but .* only True"),
    ("gpt2", {"max_position_embeddings": None}, "n_positions is None"),
    ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop is 1.5, which must be a number from 0 to 1"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, but .* only True"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, but this decoder has only 30"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is True")])
def test_what_the_decoder_has_not_is_refused_by_name(family, change, message):
    refused(family, change, message)


@pytest.mark.parametrize("key, value", [
    ("is_causal", False), ("is_causal", None), ("attention_chunk_size", 8), ("sliding_window", 8),
    ("layer_types", ["full_attention"] * 3), ("per_layer_config", {"0": {"hidden_act": "gelu"}}),
    ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5), ("text_config", {}),
    ("transformers_weights", "other.safetensors"), ("configuration_files", ["config.5.json"])])
def test_keys_that_transformers_looks_for_undeclared_are_refused(key, value):
    refused("llama", {key: value}, f"{key} is .*, which this decoder does not have")


@pytest.mark.parametrize("key", ["attribute_map", "validate_rope", "__class__", "default_theta"])
def test_no_key_replaces_a_part_of_transformers_class(key):
    refused("llama", {key: {"hidden_size": "vocab_size"}}, f"{key}' would replace a part of")


def test_what_configurations_of_the_hub_have_beside_changes_nothing():
    hub = {"_name_or_path": "./x", "torch_dtype": "float16", "transformers_version": "4.41.0", "n_ctx": 1024,
           "use_cache": True, "task_specific_params": {"text-generation": {"max_length": 50}},
           "output_attentions": True, "gradient_checkpointing": False, "masked_softmax_fusion": True,
           "attention_softmax_in_fp32": True, "bos_token_id": 1, "eos_token_id": [1, 2], "max_length": 20,
           "architectures": ["X"], "id2label": {"0": "LABEL_0"}, "_commit_hash": "0", "prefix": "</s>",
           "initializer_range": 0.1}
    for family, theirs_config in CONFIGS.items():
        plain = {"model_type": family, **theirs_config}
        assert model_config_from_hf(plain | hub, "here") == model_config_from_hf(plain, "here")


def test_other_keys_are_ignored_and_words_of_the_call_are_no_way_in():
    want = model_config_from_hf({"model_type": "llama", **SIZES}, "here")
    for change in ({"foo": {"bar": [1]}}, {"where": 1, "call": 2}, {"num_labels": 7, "id2label": None},
                   {"dtype": "bfloat16", "attention_dropout": 0.5, "use_cache": False, "is_causal": True},
                   {"rope_scaling": None}, {"per_layer_config": {}}, {"auto_map": {"AutoConfig": "x.Y"}}):
        assert model_config_from_hf({"model_type": "llama", **SIZES, **change}, "here") == want
    refused("llama", {"cls": 1}, "transformers does not read it")


@pytest.mark.parametrize("family, key", [
    ("qwen2", "num_hidden_layers"), ("gpt2", "num_hidden_layers"), ("llama", "num_labels"),
    ("bloom", "n_embed"), ("opt", "vocab_size")])
def test_sizes_are_looked_at_before_transformers_is_asked(family, key):
    """transformers would make lists of 10^12."""
    start = time.process_time()
    for value in (10**12, -1, True, 2.0, "3", [3], float("nan")):
        refused(family, {key: value}, f"{key} is .*, which must be a whole number from 1 to")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("change, message", [
    ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3},
     "'longrope', but RoPE is stretched here by linear, dynamic, yarn, llama3 only"),
    ({"rope_type": "linear", "factor": 0}, "factor is '0', which must be a number more than 0"),
    ({"rope_type": "linear", "factor": "2"}, "factor is '2', which"),
    ({"rope_type": "linear"}, "Missing required keys .*factor"),
    ({"rope_theta": None}, "rope_theta is 'None'"),
    ({"rope_theta": float("inf")}, "rope_theta is 'inf'"),
    ({"rope_theta": True}, "rope_theta is 'True'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but RoPE turns all of a head"),
    (YARN | {"rope_theta": 1.0}, "yarn' divides by its logarithm"),
    (YARN | {"truncate": None}, "truncate is None, which must be true or false"),
    (YARN | {"original_max_position_embeddings": 12.5}, "embeddings is 12.5, no whole number"),
    (YARN | {"beta_fast": -1}, "beta_fast is '-1'"),
    (YARN | {"factor": 1e12}, "the context longer than"),
    ({"rope_theta": 10**400}, "rope_theta is '1000"),
    (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor is 1.0, which must be more than low_freq_factor"),
    (LLAMA3 | {"low_freq_factor": 0}, "low_freq_factor is '0'")])
def test_scalings_that_cannot_be_computed_are_refused(change, message):
    refused("llama", {"rope_parameters": SIZES["rope_parameters"] | change}, message)


def test_heads_that_rope_cannot_turn_are_refused():
    refused("mistral", {"head_dim": 3}, "RoPE turns pairs, and a head of 3")
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    refused("llama", {"head_dim": 2, "rope_parameters": dynamic}, "divides by head_dim - 2, which is 0")
    refused("phi3", {"rope_parameters": YARN}, "transformers does not read it")


def test_yarns_factor_may_be_left_to_the_lengths():
    _, scaling, context = rope_from_hf(YARN | {"factor": None}, 48, 6)
    assert (scaling.factor, context) == (4.0, 48)
    assert scaling.attention_factor == rope_from_hf(YARN, 48,
                                                    6)[1].attention_factor == pytest.approx(1.138629)


def test_factors_by_pair_are_written_where_they_are_llama_3s_and_refused_where_not():
    config = ModelConfig(vocab=9, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=8, context=99,
                         theta=500000.0)
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor, 8192)
        plain, stretched = (frequencies(config, kind) for kind in (None, scaling))
        factors = tuple((plain / stretched).tolist())
        given = replace(config, rope_scaling=RopeScaling("factors", factors=factors))
        assert model_config_from_hf(model_config_to_hf(given), "here").rope_scaling == scaling
    given = replace(config, rope_scaling=RopeScaling("factors", factors=(1.0, 1.0, 2.0, 2.0)))
    with pytest.raises(ValueError, match="no key for RoPE's factors by pair, and these are not Llama 3.1's"):
        model_config_to_hf(given)


def frequencies(config, scaling):
    from nanoinfra.model.rope import _llama3
    plain = 1.0 / config.theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    return _llama3(plain, scaling, config.theta) if scaling else plain


def test_only_a_folder_needs_transformers():
    code = ("import sys; sys.modules['transformers'] = None\n"
            "import nanoinfra.cli, nanoinfra.train.load_and_export_models\n"
            "import nanoinfra.model.weights.load_model\n"
            "from nanoinfra.model.weights.hugging_face import config\n"
            "from nanoinfra.config import config_for_size\n"
            "theirs = config.model_config_to_hf(config_for_size('test'))\n"
            "try: config.model_config_from_hf(theirs, 'here')\n"
            "except ValueError as error: print(error)")
    got = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert got == "here: Hugging Face folders need the package transformers; pip install 'nanoinfra[hub]'\n"
