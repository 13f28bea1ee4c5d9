"""Build a byte-level BPE tokenizer from a GGUF file's tokens, merges and pre-tokenizer name.

Merges never cross a split of the pre-tokenizer, so a wrong one gives other ids for the same text: SmolLM2
splits "2024" into four digits. The file only names its pre-tokenizer (`tokenizer.ggml.pre`); here are those
of the families that the decoder has, as in llama.cpp (src/llama-vocab.cpp). Any other name is refused. There
is no normalizer: llama.cpp has none, not even Qwen's NFC.
"""
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASES = [r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+",
          r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"]
_CASES_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """How a text is split before byte-level BPE merges are applied."""
    split_patterns: tuple[str, ...]          # regular expressions, applied one after the other
    ignore_merges: bool = False                # a word that is a token needs no merges
    adds_bos_token: bool = False             # a text begins with BOS where the file does not say


_GPT2 = PreTokenizer((_GPT2_PATTERN,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2_PATTERN))
_QWEN2 = PreTokenizer((_WORDS + r"\p{N}" + _REST,))
_THREES = PreTokenizer((_WORDS + r"\p{N}{1,3}" + _REST,))
_LLAMA3 = _THREES._replace(ignore_merges=True, adds_bos_token=True)
_TEKKEN = PreTokenizer(("|".join([*_CASES, r"\p{N}"]) + _CASES_REST,), True, True)
_GPT4O = PreTokenizer((
    "|".join([f"{case}{_CONTRACTIONS}?" for case in _CASES] + [r"\p{N}{1,3}"]) + _CASES_REST,))
_QWEN35 = PreTokenizer((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
                        + _REST.replace(r"\s\p{L}", r"\s\p{L}\p{M}"),))
_SEED = PreTokenizer((_WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",))
_DEEPSEEK = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                          "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"))
PRE_TOKENIZERS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mellum", "roberta-bpe", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _THREES),
    "tekken": _TEKKEN, "qwen35": _QWEN35, "seed-coder": _SEED, "deepseek-coder": _DEEPSEEK,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}


def build_byte_level_bpe(tokens: list[str], merges: list[str], pre_tokenizer: str | None) -> Tokenizer:
    """A byte-level BPE tokenizer with the named pre-tokenizer.

    Raises ValueError for an unknown pre-tokenizer, or for merges that do not fit the tokens.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(f"its pre-tokeniser {pre_tokenizer!r} is unknown (known: "
                         f"{', '.join(PRE_TOKENIZERS)}), and "
                         "another would split text differently than the model was trained on")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs) if len(pair) != 2]:
        raise ValueError(f"its tokenizer's merge {wrong[0]!r} is not two tokens with a space between")
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs,
                           ignore_merges=PRE_TOKENIZERS[pre_tokenizer].ignore_merges)
    except Exception as error:               # a merge whose parts are not tokens
        raise ValueError(f"its tokenizer's merges do not fit its tokens: {error}") from error
    backend = Tokenizer(model)
    patterns = PRE_TOKENIZERS[pre_tokenizer].split_patterns
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def adds_bos_by_default(pre_tokenizer: str) -> bool:
    """Whether a text begins with BOS where the file does not say, with this pre-tokenizer."""
    return PRE_TOKENIZERS[pre_tokenizer].adds_bos_token
