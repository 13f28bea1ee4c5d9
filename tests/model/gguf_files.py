"""Tiny GGUF files of every architecture and tokenizer, drawn from fixed seeds with numpy alone.

So the same files can be written here and where llama.cpp is asked about them (record_llama_cpp.py).
"""
import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
BASE = {"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 2e-5,
        "rope.freq_base": 500.0}
GPT2 = {"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.layer_norm_epsilon": 3e-5}
WIDE = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 1}       # rows of whole K blocks
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
FACTORS = (1.0, 1.5, 4.0, 8.0)
VOCAB, LENGTH = 64, 40
MODELS = {                                   # name -> (architecture, what `write_model` is given)
    "llama": ("llama", {}),
    "llama, tied, no groups": ("llama", {"fields": {"attention.head_count_kv": 4}, "tied": True}),
    "llama, all biases": ("llama", {"biases": "q k v output gate up down".split()}),
    "llama, biases of q k v": ("llama", {"biases": "q k v".split()}),
    "llama, heads of 12": ("llama", {"fields": {"attention.key_length": 12, "attention.value_length": 12,
                                                "rope.dimension_count": 12}}),
    "llama, fused": ("llama", {"fused": True, "biases": "q k v output".split()}),
    "llama, linear": ("llama", {"fields": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}}),
    "llama, linear by its old key": ("llama", {"fields": {"rope.scale_linear": 2.0}}),
    "llama, yarn": ("llama", {"fields": YARN}),
    "llama, yarn and a factor": ("llama", {"fields": YARN | {"rope.scaling.attn_factor": 0.8}}),
    "llama, no scaling": ("llama", {"fields": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}}),
    "llama, factors": ("llama", {"factors": FACTORS}),
    "llama, factors and linear": ("llama", {"factors": FACTORS, "fields": {"rope.scaling.factor": 2.0}}),
    "qwen2": ("qwen2", {"biases": "q k v".split()}),
    "qwen2, no biases": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"biases": "q k v".split(), "fields": YARN}),
    "qwen3": ("qwen3", {"fields": {"attention.key_length": 16, "attention.value_length": 16}}),
    "phi3": ("phi3", {"fused": True}),
    "phi3, wide window": ("phi3", {"fused": True, "fields": {"attention.sliding_window": 64}}),
    "gpt2": ("gpt2", {"fused": True}),
    "gpt2, own head": ("gpt2", {"fused": True, "tied": False}),
}
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
          "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,)}
KINDS = ("F16", "BF16", *SCALES)             # where in a block its float16 scales lie


def models():
    """All of `MODELS`, and one of each quantised type."""
    quantised = {kind: ("llama", {"fields": WIDE, "kind": kind}) for kind in KINDS}
    return MODELS | quantised


def write_model(path, architecture, fields=None, biases=(), fused=False, tied=None, factors=(), kind="F32",
                tokenizer=None, general=None, said=None):
    """A model of random weights of the sizes in `fields`; where `said` has one, the file claims that.

    Keys stand without the architecture's name; None drops one.
    """
    shape = (GPT2 if architecture == "gpt2" else BASE) | (fields or {})
    writer = gguf.GGUFWriter(path, architecture)
    add(writer, {f"{architecture}.{key}": value for key, value in (shape | (said or {})).items()})
    add(writer, general or {})
    add(writer, tokenizer or names(VOCAB))
    draws = np.random.RandomState(7)
    tied = architecture == "gpt2" if tied is None else tied
    vocab = len((tokenizer or names(VOCAB))["tokenizer.ggml.tokens"])
    for name, size in shapes(architecture, shape, biases, fused, tied, vocab).items():
        stored = Kind[kind] if len(size) > 1 else Kind.F32
        writer.add_tensor(name, drawn(draws, name, size, stored), raw_dtype=stored)
    if len(factors):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    return close(writer, path)


def shapes(architecture, shape, biases, fused, tied, vocab):
    """{name: (out, in)} of a model's tensors."""
    C, F, H = shape["embedding_length"], shape["feed_forward_length"], shape["attention.head_count"]
    K, KV = shape.get("attention.key_length", C // H), shape.get("attention.head_count_kv", H)
    found = {"token_embd.weight": (vocab, C), "output_norm.weight": (C,)}
    found |= {} if tied else {"output.weight": (vocab, C)}
    linear = {"attn_q": (H * K, C), "attn_k": (KV * K, C), "attn_v": (KV * K, C), "attn_output": (C, H * K),
              "ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
    there = {f"attn_{x}" if x in ("q", "k", "v", "output") else f"ffn_{x}" for x in biases}
    if architecture == "gpt2":
        found |= {"position_embd.weight": (shape["context_length"], C), "output_norm.bias": (C,)}
        del linear["ffn_gate"]
        there = set(linear)
    if fused:
        rows = sum(linear.pop(f"attn_{x}")[0] for x in "qkv")
        linear = {"attn_qkv": (rows, C)} | linear
        there |= {"attn_qkv"} if "attn_q" in there else set()
    if architecture == "phi3":
        linear["ffn_up"] = (2 * F, C)
        del linear["ffn_gate"]
    for i in range(shape["block_count"]):
        for norm in ("attn_norm", "ffn_norm"):
            found |= {f"blk.{i}.{norm}.weight": (C,)}
            found |= {f"blk.{i}.{norm}.bias": (C,)} if architecture == "gpt2" else {}
        if architecture == "qwen3":
            found |= {f"blk.{i}.attn_{x}_norm.weight": (K,) for x in "qk"}
        for part, size in linear.items():
            found |= {f"blk.{i}.{part}.weight": size}
            found |= {f"blk.{i}.{part}.bias": size[:1]} if part in there else {}
    return found


def drawn(draws, name, size, stored):
    """Numbers about 0, a norm's about 1; of a quantised type random blocks with small scales."""
    if stored in (Kind.F32, Kind.F16, Kind.BF16):
        x = draws.uniform(-0.4, 0.4, size) + (1 if "norm" in name and name.endswith("weight") else 0)
        return gguf.quantize(x.astype(np.float32), stored)
    block, nbytes = gguf.GGML_QUANT_SIZES[stored]
    x = draws.randint(0, 256, (*size[:-1], size[-1] // block, nbytes)).astype(np.uint8)
    small = {"Q8_0": 1e-3, "Q6_K": 5e-5, "Q4_K": 3e-4, "Q5_K": 2e-4, "Q2_K": 5e-3, "Q3_K": 2e-3,
             "IQ4_XS": 5e-5, "IQ4_NL": 1e-3, "Q5_1": 5e-3, "Q4_1": 5e-3}
    for place in SCALES[stored.name]:
        scale = draws.uniform(0.5, 1.5, x.shape[:-1]) * small.get(stored.name, 0.02)
        x[..., place:place + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return x.reshape(*size[:-1], -1)


def add(writer, fields):
    """Keys with the types that llama.cpp's converter gives them."""
    kinds = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string,
             list: writer.add_array}
    for key, value in fields.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif value is not None:
            kinds[type(value)](key, value)


def close(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prompt(vocab=VOCAB):
    """Ids past every border: of the original context, and of windows."""
    return np.random.RandomState(3).randint(0, vocab, LENGTH).tolist()


def names(count):
    """A tokenizer of bare names."""
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["t 0"],
            "tokenizer.ggml.tokens": ["t", "0", *(f"t{i}" for i in range(count - 2))]}
