"""transformers' own models with awkward sizes and random weights, to compare ours with."""
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 3, "intermediate_size": 50, "max_position_embeddings": 37,
         "rms_norm_eps": 2e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
LAYERED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
CONFIGS = {                                  # the config.json of each, as short as can be
    "gpt2": {"vocab_size": 97, "n_embd": 30, "n_layer": 3, "n_head": 5, "n_positions": 37, "n_inner": 44,
             "layer_norm_epsilon": 3e-5, "pad_token_id": None},
    "llama": SIZES,
    "mistral": SIZES | {"head_dim": 8, "sliding_window": 11},
    "phi3": SIZES | {"num_key_value_heads": 2, "sliding_window": 11, "pad_token_id": None},
    "qwen2": SIZES | LAYERED,
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 14},
    "opt": {"vocab_size": 97, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 6,
            "ffn_dim": 44, "max_position_embeddings": 37},
    "bloom": {"vocab_size": 97, "hidden_size": 30, "n_layer": 3, "n_head": 6, "layer_norm_epsilon": 3e-5},
}
FAMILIES = ("gpt2", "llama", "qwen3", "opt", "bloom")
READ = tuple(CONFIGS)                        # all that can be read


def theirs(family, tied=True, seed=0, **changes):
    """transformers' model of `family`, every weight, bias and norm drawn at random."""
    config = AutoConfig.for_model(family, **CONFIGS[family] | {"tie_word_embeddings": tied} | changes)
    return scrambled(AutoModelForCausalLM.from_config(config), seed).eval()


@torch.no_grad()
def scrambled(model, seed=0):
    """Every parameter drawn anew, biases and norms too, wide enough that the logits differ."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.uniform_(0.5 if norm else -0.4, 1.5 if norm else 0.4, generator=draws)
    return model


def tokens(vocab, shape=(2, 33)):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, other, length=33):
    """Largest difference of our logits from transformers', over a batch of long sequences."""
    x = tokens(model.config.vocab, (2, length))
    want, got = other(x).logits, model(x)
    assert want.std() > 0.5                  # the comparison means something
    return (got - want).abs().max().item()
