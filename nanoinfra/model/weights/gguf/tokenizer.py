"""The tokenizer inside a GGUF file, as llama.cpp reads it: its kind, its special tokens, what ends an answer.

`tokenizer.ggml.model` is "gpt2" (byte-level BPE, gguf_bpe.py) or "llama" (sentencepiece's BPE by scores,
gguf_spm.py). Special tokens are found in text before anything else. llama.cpp knows more ends than the file
names: tokens called <|eot_id|>, <|im_end|> and so on (src/llama-vocab.cpp, special_eog_ids).
"""
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.gguf.bpe_tokenizer import byte_level_bpe, opens_with_bos
from nanoinfra.model.weights.gguf.config import Keys
from nanoinfra.model.weights.gguf.sentencepiece_tokenizer import spm

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4     # tokenizer.ggml.token_type
ENDS = {                                     # what these are called ends an answer
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~["}
FILL = {                                     # of filling in the middle; the first three end an answer too
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
    "fim_pre": {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"},
    "fim_suf": {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"},
    "fim_mid": {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"}}
FILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")
IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2}}       # where the file does not say
NO_STRIP = ("<unk>", "<s>", "<|endoftext|>")            # Phi-3's others swallow the space after them


def build_text(fields: Mapping[str, object]) -> Text:
    """The tokenizer of an open GGUF file's `fields`. Raises ValueError for one that is unknown or broken."""
    keys = Keys(fields, "tokenizer.ggml.")
    model = keys.get("model", str)
    if model not in IDS:
        raise ValueError(f"its tokenizer is a {model!r}, but only {' and '.join(map(repr, IDS))} are known")
    tokens, kinds = _tokens(keys)
    ids = {name: _id(keys, name, len(tokens), IDS[model].get(name))
           for name in ("bos", "eos", "eot", "eom", *FILL)}
    if model == "llama":
        backend, begins = spm(keys, tokens, _special(tokens, kinds)), True
    else:
        pre = keys.get("pre", str, None)
        backend, begins = byte_level_bpe(tokens, keys.get("merges", list, []), pre), opens_with_bos(pre)
    ends = _ends(tokens, ids)
    _add_tokens(backend, tokens, kinds, "phi-3" in _name(fields) or "phi3" in _name(fields))
    _surround(backend, keys, ids, begins)
    bos, eos = ("" if ids[name] is None else tokens[ids[name]] for name in ("bos", "eos"))
    return Text(backend, frozenset(ends), bos, eos)


def _tokens(keys):
    """Names and kinds of all tokens; llama.cpp names what is empty, and takes some for control tokens."""
    tokens = keys.get("tokens", list)
    kinds = keys.get("token_type", np.ndarray, np.full(len(tokens), NORMAL)).tolist()
    if len(kinds) < len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens, but {len(kinds)} types of tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError("its tokenizer has no tokens, or two of one name")
    named = ENDS.union(*FILL.values())
    return tokens, [CONTROL if token in named else kind for token, kind in zip(tokens, kinds)]


def _special(tokens, kinds):
    return {token for token, kind in zip(tokens, kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}


def _id(keys, name, count, default):
    got = keys.get(f"{name}_token_id", int, default if default is not None and default < count else None)
    if got is not None and not 0 <= got < count:
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {got}, but there are {count} tokens")
    return got


def _ends(tokens, ids):
    """Ids that end an answer."""
    place = {token: i for i, token in enumerate(tokens)}
    found = {ids[name] for name in ("eos", "eot", "eom", *FILL_ENDS)} - {None}
    named = ENDS.union(*(FILL[name] for name in FILL_ENDS if ids[name] is None))
    return found | {place[name] for name in named if name in place}


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], kinds: Sequence[int], strips: bool) -> None:
    """Special tokens are found in text by name; those that the user defined are text all the same."""
    for special, wanted in ((True, (UNKNOWN, CONTROL)), (False, (USER_DEFINED,))):
        found = [AddedToken(token, special=special, normalized=False, rstrip=strips and token not in NO_STRIP)
                 for token, kind in zip(tokens, kinds) if kind in wanted]
        (backend.add_special_tokens if special else backend.add_tokens)(found)


def _surround(backend, keys, ids, begins):
    """The first and the last token, where the file asks for them."""
    names = []
    for name, default in (("bos", begins), ("eos", False)):
        if keys.get(f"add_{name}_token", bool, default):
            if ids[name] is None:
                raise ValueError(f"its tokenizer asks for a {name} token with every text, but names none")
            names.append(name)
    if names:
        single = " ".join((["bos"] if "bos" in names else []) + ["$A"] + (["eos"] if "eos" in names else []))
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, ids[name]) for name in names])


def _name(fields):
    return Keys(fields).get("general.name", str, "").lower()
