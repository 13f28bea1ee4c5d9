"""The tokenizer in a GGUF file, as llama.cpp reads it, with its special and end-of-generation tokens.

`tokenizer.ggml.model` is "gpt2" (byte-level BPE, bpe_tokenizer.py) or "llama" (SentencePiece BPE by scores,
sentencepiece_tokenizer.py). Special tokens are found in text before anything else. llama.cpp ends a
generation at more tokens than the file names: <|eot_id|>, <|im_end|> and so on (src/llama-vocab.cpp,
special_eog_ids).
"""
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, processors

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.gguf.bpe_tokenizer import adds_bos_by_default, build_byte_level_bpe
from nanoinfra.model.weights.gguf.config import GGUFMetadata
from nanoinfra.model.weights.gguf.sentencepiece_tokenizer import build_sentencepiece_bpe

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4     # tokenizer.ggml.token_type
END_OF_GENERATION_TOKENS = {                 # llama.cpp's EOG
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~["}
_FILL_IN_MIDDLE_TOKENS = {                   # FIM; the first three end a generation too
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
    "fim_pre": {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"},
    "fim_suf": {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"},
    "fim_mid": {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"}}
FILL_IN_MIDDLE_END_TOKENS = ("fim_pad", "fim_rep", "fim_sep")
DEFAULT_TOKEN_IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2}}       # where the file does not say
_NO_STRIP_TOKENS = ("<unk>", "<s>", "<|endoftext|>")    # Phi-3's other tokens strip the space after them


def build_gguf_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer in an open GGUF file's metadata. Raises ValueError if it is unknown or broken."""
    keys = GGUFMetadata(metadata, "tokenizer.ggml.")
    model = keys.get_typed("model", str)
    if model not in DEFAULT_TOKEN_IDS:
        known = " and ".join(map(repr, DEFAULT_TOKEN_IDS))
        raise ValueError(f"its tokenizer is a {model!r}, but only {known} are known")
    tokens, kinds = _tokens(keys)
    ids = {name: _id(keys, name, len(tokens), DEFAULT_TOKEN_IDS[model].get(name))
           for name in ("bos", "eos", "eot", "eom", *_FILL_IN_MIDDLE_TOKENS)}
    if model == "llama":
        backend, adds_bos = build_sentencepiece_bpe(keys, tokens, _special(tokens, kinds)), True
    else:
        pre = keys.get_typed("pre", str, None)
        backend = build_byte_level_bpe(tokens, keys.get_typed("merges", list, []), pre)
        adds_bos = adds_bos_by_default(pre)
    ends = _ends(tokens, ids)
    _add_tokens(backend, tokens, kinds, "phi-3" in _name(metadata) or "phi3" in _name(metadata))
    _surround(backend, keys, ids, adds_bos)
    bos, eos = ("" if ids[name] is None else tokens[ids[name]] for name in ("bos", "eos"))
    return Tokenizer(backend, frozenset(ends), bos, eos)


def _tokens(keys):
    """Text and type of all tokens; as in llama.cpp, empty ones get a name, known ones are control."""
    tokens = keys.get_typed("tokens", list)
    kinds = keys.get_typed("token_type", np.ndarray, np.full(len(tokens), _NORMAL)).tolist()
    if len(kinds) < len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens, but {len(kinds)} types of tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError("its tokenizer has no tokens, or two of one name")
    named = END_OF_GENERATION_TOKENS.union(*_FILL_IN_MIDDLE_TOKENS.values())
    return tokens, [_CONTROL if token in named else kind for token, kind in zip(tokens, kinds)]


def _special(tokens, kinds):
    return {token for token, kind in zip(tokens, kinds) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}


def _id(keys, name, count, default):
    usable_default = default if default is not None and default < count else None
    got = keys.get_typed(f"{name}_token_id", int, usable_default)
    if got is not None and not 0 <= got < count:
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {got}, but there are {count} tokens")
    return got


def _ends(tokens, ids):
    """The ids that end a generation."""
    place = {token: i for i, token in enumerate(tokens)}
    found = {ids[name] for name in ("eos", "eot", "eom", *FILL_IN_MIDDLE_END_TOKENS)} - {None}
    unnamed = [name for name in FILL_IN_MIDDLE_END_TOKENS if ids[name] is None]
    named = END_OF_GENERATION_TOKENS.union(*(_FILL_IN_MIDDLE_TOKENS[name] for name in unnamed))
    return found | {place[name] for name in named if name in place}


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int],
                strips: bool) -> None:
    """Add tokens that are found in text by name: special ones, and user-defined ones, which are decoded."""
    for special, wanted in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        found = [AddedToken(token, special=special, normalized=False,
                            rstrip=strips and token not in _NO_STRIP_TOKENS)
                 for token, kind in zip(tokens, kinds) if kind in wanted]
        (backend.add_special_tokens if special else backend.add_tokens)(found)


def _surround(backend, keys, ids, adds_bos):
    """Make the tokenizer add BOS and EOS to a text, where the file asks for it."""
    names = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        if keys.get_typed(f"add_{name}_token", bool, default):
            if ids[name] is None:
                raise ValueError(f"its tokenizer asks for a {name} token with every text, but names none")
            names.append(name)
    if names:
        single = " ".join((["bos"] if "bos" in names else []) + ["$A"] + (["eos"] if "eos" in names else []))
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, ids[name]) for name in names])


def _name(metadata):
    return GGUFMetadata(metadata).get_typed("general.name", str, "").lower()
