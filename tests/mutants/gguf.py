"""Known-wrong readings of GGUF files: rows in another order, keys passed over, text cut or joined otherwise.

`model` computes logits of a small file, `text` makes ids of strings: both against llama.cpp's recorded
answers. `opens` says why a file is refused. A mutant of the library is patched in meanwhile.
"""
import json
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import normalizers

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.weights.gguf import bpe_tokenizer, file_format, load_gguf, sentencepiece_tokenizer
from nanoinfra.model.weights.gguf import config as gguf_config
from nanoinfra.model.weights.gguf.load_gguf import FUSED_GGUF_TENSORS, load_gguf_model, open_gguf_weights
from nanoinfra.model.weights.gguf.tokenizer import build_gguf_tokenizer
from tests.model.gguf_files import FACTORS, MODELS, names, prompt, write_model
from tests.model.gguf_tokenizers import STRINGS, tokenizers
from tests.model.record_llama_cpp import RECORDED, SHOWN

models, texts, files = Check("a GGUF model"), Check("a GGUF tokenizer"), Check("a GGUF file that is refused")
WANT = json.loads(RECORDED.read_text())


def model(name):
    """Logits (T, SHOWN) of a small file."""
    architecture, how = MODELS[name]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = write_model(Path(folder, "m.gguf"), architecture, **how)
        return load_gguf_model(path)[0](torch.tensor([prompt()]))[0, :, :SHOWN]


def text(name):
    """(ids of all strings, ids that end an answer)."""
    how = tokenizers()[name]
    built = build_gguf_tokenizer(how["tokenizer"] | how.get("general", {}) | {
        f"tokenizer.ggml.{key}": np.array(how["tokenizer"][f"tokenizer.ggml.{key}"])
        for key in ("token_type", "scores") if f"tokenizer.ggml.{key}" in how["tokenizer"]})
    return [built.encode(string) for string in STRINGS], sorted(built.eos_token_ids)


def opens(**how):
    """Why a small LLaMA is refused, or None; `change` is made of its bytes."""
    change = how.pop("change", bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder, "m.gguf"), "llama", **how)
        path.write_bytes(change(path.read_bytes()))
        try:
            open_gguf_weights(path)
        except ValueError as error:
            return str(error)


def _computes(name):
    @models.criterion(name, "parity")
    def _(subject):
        far = (subject(name) - torch.tensor(WANT[f"logits {name}"])).abs().max().item()
        if not far <= 5e-3:                  # GPT-2's GELU is a table of float16 there
            raise CriterionNotMet(f"{name}: logits differ from llama.cpp's by {far:.2g}")


def _spells(name):
    @texts.criterion(name, "parity")
    def _(subject):
        ids, ends = subject(name)
        for string, want, got in zip(STRINGS, WANT[f"ids {name}"], ids):
            if got != want:
                raise CriterionNotMet(f"{name}: {string!r} is {got}, llama.cpp's ids are {want}")
        if ends != WANT[f"ends {name}"]:
            raise CriterionNotMet(f"{name}: {ends} end an answer, in llama.cpp it is {WANT[f'ends {name}']}")


def _refuses(name, says, **how):
    @files.criterion(name, "property")
    def _(subject):
        why = subject(**how)
        if says not in (why or ""):
            raise CriterionNotMet(f"want a refusal with {says!r}, got {why!r}")


for each in MODELS:
    _computes(each)
for each in tokenizers():
    _spells(each)


def cut(data):
    return data[:-64]


def moved(data):
    """Its second tensor lies where the first does."""
    at = data.index(struct.pack("<Q", 18) + b"output_norm.weight") + 8 + 18 + 4 + 8 + 4
    return data[:at] + struct.pack("<Q", 0) + data[at + 8:]


def versioned(data):
    return data[:4] + struct.pack("<I", 1) + data[8:]


def crowded(data):
    return data[:8] + struct.pack("<Q", 2 ** 60) + data[16:]


def spoiled(**header):
    """The small sentencepiece tokenizer, with other keys."""
    other = {f"tokenizer.ggml.{key}": value for key, value in header.items()}
    return tokenizers()["spm"]["tokenizer"] | other


COUNT = len(spoiled()["tokenizer.ggml.tokens"])
STRANGE = spoiled()["tokenizer.ggml.tokens"][:-1] + ["a\u0416"]           # the latter half is no token
_refuses("cut off", "the file is cut off", change=cut)
_refuses("one tensor in another", "inside another one", change=moved)
_refuses("version 1", "GGUF version 1", change=versioned)
_refuses("counts without end", "claims 1152921504606846976 tensors", change=crowded)
_refuses("a piece of a model", "one of 3 pieces", general={"split.count": 3})
_refuses("keys that change the maths", "llama.expert_count = 8", said={"expert_count": 8})
_refuses("heads that RoPE turns in part", "RoPE turns 4", said={"rope.dimension_count": 4})
_refuses("layers that differ", "layers differ", said={"attention.head_count_kv": [2, 1]})
_refuses("numbers that are none", "not a finite number", said={"rope.freq_base": float("nan")})
_refuses("longrope", "rope.scaling.type = longrope", said={"rope.scaling.type": "longrope"})
_refuses("layers without tensors", "too few for 4000000000 layers", said={"block_count": 4_000_000_000})
_refuses("scores that say nothing", "the same score", tokenizer=spoiled(scores=[-1.0] * COUNT))
_refuses("a token of what is none", "not every character", tokenizer=spoiled(
    tokens=STRANGE, token_type=[*spoiled()["tokenizer.ggml.token_type"][:-1], 1]))
_refuses("an unknown pre-tokeniser", "is unknown", tokenizer=names(64) | {"tokenizer.ggml.pre": "viking"})


def fetches(wrong):
    """Read tensors as if the file's architecture was `wrong(name, architecture)`."""
    right = load_gguf._read_stored
    return patched(model, "nanoinfra.model.weights.gguf.load_gguf:_read_stored",
                   lambda *args: right(*args[:4], wrong(args[1], args[4])))


def scaled(change):
    """RoPE's scaling with a slip; `change` is made of the right one."""
    right = gguf_config._rope_scaling
    return patched(model, "nanoinfra.model.weights.gguf.config:_rope_scaling",
                   lambda keys, config, factors: change(right(keys, config, factors), factors))


def only(kind, **change):
    return lambda scaling, _: replace(scaling, **change) if scaling and scaling.kind == kind else scaling


def pre(**other):
    """With other splits of some names."""
    return patched(text, "nanoinfra.model.weights.gguf.bpe_tokenizer:PRE_TOKENIZERS",
                   bpe_tokenizer.PRE_TOKENIZERS | {
        name.replace("_", "-"): splits for name, splits in other.items()})


def composed(tokens, merges, name):
    backend = bpe_tokenizer.build_byte_level_bpe(tokens, merges, name)
    backend.normalizer = normalizers.NFC()
    return backend


def shortest_first(tokens, scores, ids):
    right = merges_by_score(tokens, scores, ids)
    return sorted(right, key=lambda pair: (-scores[ids["".join(pair)]], len(pair[0])))


def unplaced(listed, end, alignment, size):
    start = -(-end // alignment) * alignment
    return {name: file_format.StoredTensor(kind, shape, start + offset)
            for name, (shape, kind, offset) in listed.items()}


def placed_anywhere(listed, end, alignment, size):
    """Only the end is looked at."""
    found = unplaced(listed, end, alignment, size)
    if any(tensor.start_byte + tensor.nbytes() > size for tensor in found.values()):
        raise ValueError(file_format.DAMAGED_FILE_HINT)
    return found


class Believing(file_format._Header):
    def count(self, what, least, most=2 ** 64):
        return self.number("Q")


class First(gguf_config.GGUFMetadata):
    def positive_int(self, key, *default):
        got = self.metadata.get(self.prefix + key, *default)
        return got[0].item() if isinstance(got, np.ndarray) else got


class Careless(gguf_config.GGUFMetadata):
    def positive_float(self, key, *default):
        return self.get_typed(key, float, *default)


def whole_model(fields):
    return fields["general.architecture"]


def all_turned(keys, heads, width):
    return {"head_dim": width // heads, "kv_heads": keys.positive_int("attention.head_count_kv", heads)}


merges_by_score, THREES = sentencepiece_tokenizer.merges_by_score, bpe_tokenizer.PRE_TOKENIZERS["dbrx"]
FILE, CONFIG = "nanoinfra.model.weights.gguf.file_format:", "nanoinfra.model.weights.gguf.config:"
SPM, TEXT = "nanoinfra.model.weights.gguf.sentencepiece_tokenizer:", "nanoinfra.model.weights.gguf.tokenizer:"

MUTANTS = [
    Mutant("pairs are left as llama.cpp has them", models,
           patched(model, "nanoinfra.model.weights.gguf.load_gguf:deinterleave_rope_rows", lambda x, K: x),
           "llama"),
    Mutant("pairs are undone in every architecture", models, fetches(lambda name, said: "llama"), "qwen2"),
    Mutant("pairs of fused tensors are left", models,
           fetches(lambda name, said: "qwen2" if "attn_qkv" in name else said), "llama, fused"),
    Mutant("pairs of biases are left", models,
           fetches(lambda name, said: "qwen2" if name.endswith("bias") else said), "llama, all biases"),
    Mutant("up before gate", models,
           patched(model, "nanoinfra.model.weights.gguf.load_gguf:FUSED_GGUF_TENSORS",
                   FUSED_GGUF_TENSORS | {"ffn_up": ("mlp.up", "mlp.gate")}), "phi3"),
    Mutant("biases are those of the family", models,
           patched(model, CONFIG + "_biased", lambda config, names: config), "llama, all biases"),
    Mutant("no scaling", models, scaled(lambda scaling, _: None), "llama, linear"),
    Mutant("yarn without its longer cos and sin", models, scaled(only("yarn", attention_factor=1.0)),
           "llama, yarn"),
    Mutant("attn_factor is passed over", models, scaled(only("yarn", attention_factor=1.1386294361119891)),
           "llama, yarn and a factor"),
    Mutant("factors without the linear one", models,
           scaled(lambda scaling, factors: replace(scaling, factors=tuple(factors)) if factors else scaling),
           "llama, factors and linear"),
    Mutant("factors multiply", models, scaled(only("factors", factors=tuple(1 / x for x in FACTORS))),
           "llama, factors"),

    Mutant("text is composed", texts, patched(text, TEXT + "build_byte_level_bpe", composed),
           "bpe, gpt-2"),
    Mutant("ends by key alone", texts, patched(text, TEXT + "END_OF_GENERATION_TOKENS", set()), "bpe, gpt-2"),
    Mutant("tokens of filling in never end", texts, patched(text, TEXT + "FILL_IN_MIDDLE_END_TOKENS", ()),
           "bpe, ends by name and by key"),
    Mutant("digits stay together", texts, pre(smollm=bpe_tokenizer.PRE_TOKENIZERS["gpt-2"]), "bpe, smollm"),
    Mutant("whole words are merged too", texts, pre(llama_bpe=THREES._replace(adds_bos_token=True)),
           "bpe, llama-bpe"),
    Mutant("no first token where nothing is said", texts,
           patched(text, TEXT + "adds_bos_by_default", lambda pre: False), "bpe, llama-bpe"),
    Mutant("shortest left part first", texts,
           patched(text, SPM + "merges_by_score", shortest_first), "spm"),
    Mutant("lowest score first", texts,
           patched(text, SPM + "merges_by_score", lambda *args: merges_by_score(*args)[::-1]), "spm"),
    Mutant("the space after a special token stays", texts,
           patched(text, TEXT + "_name", lambda fields: ""), "spm, phi-3"),

    Mutant("tensors lie where they say", files, patched(opens, FILE + "_placed", unplaced), "cut off"),
    Mutant("tensors lie anywhere in the file", files, patched(opens, FILE + "_placed", placed_anywhere),
           "one tensor in another"),
    Mutant("any version", files, patched(opens, FILE + "SUPPORTED_GGUF_VERSIONS", (1, 2, 3)), "version 1"),
    Mutant("counts are believed", files, patched(opens, FILE + "_Header", Believing), "counts without end"),
    Mutant("pieces are wholes", files, patched(patched(
        opens, CONFIG + "gguf_architecture", whole_model),
        "nanoinfra.model.weights.gguf.load_gguf:gguf_architecture", whole_model),
        "a piece of a model"),
    Mutant("unknown keys are passed over", files,
           patched(opens, CONFIG + "_check_keys", lambda keys, config: None), "keys that change the maths"),
    Mutant("RoPE turns all of a head", files, patched(opens, CONFIG + "_heads", all_turned),
           "heads that RoPE turns in part"),
    Mutant("layers are as the first", files,
           patched(opens, CONFIG + "GGUFMetadata", First), "layers that differ"),
    Mutant("any number will do", files,
           patched(opens, CONFIG + "GGUFMetadata", Careless), "numbers that are none"),
    Mutant("no scaling is asked for", files,
           patched(opens, CONFIG + "_rope_scaling", lambda keys, config, factors: None), "longrope"),
    Mutant("equal scores in any order", files,
           patched(opens, SPM + "_check_ties", lambda found: None), "scores that say nothing"),
    Mutant("unknown characters join", files,
           patched(opens, SPM + "_joins_no_token", lambda token, ids: False),
           "a token of what is none"),
    Mutant("an unknown pre-tokeniser is GPT-2's", files,
           patched(opens, "nanoinfra.model.weights.gguf.bpe_tokenizer:PRE_TOKENIZERS",
                   bpe_tokenizer.PRE_TOKENIZERS | {"viking": bpe_tokenizer.PRE_TOKENIZERS["gpt-2"]}),
           "an unknown pre-tokeniser"),
]
