"""Byte-level BPE from a GGUF file's tokens and merges, split as its `tokenizer.ggml.pre` says.

Merges never cross a split, so a wrong pre-tokeniser gives other ids for the same text: SmolLM2 reads "2024"
as four digits. The file only names the rule; here are those of the families that the decoder has, as
llama.cpp writes them (src/llama-vocab.cpp), one expression after the other. Any other name is refused. There
is no normaliser: llama.cpp has none, Qwen's own NFC not either.
"""
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CASES = [r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+",
         r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"]
CASES_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splits(NamedTuple):
    """How a text is cut before the bytes."""
    expressions: tuple[str, ...]
    whole_words: bool = False                # is a word that is a token taken without merging
    bos: bool = False                        # does a text begin with bos where the file does not say


_GPT2, _DIGITS = Splits((GPT2,)), Splits((r"\p{N}", GPT2))
_QWEN2 = Splits((WORDS + r"\p{N}" + REST,))
_THREES = Splits((WORDS + r"\p{N}{1,3}" + REST,))
_LLAMA3 = _THREES._replace(whole_words=True, bos=True)
_TEKKEN = Splits(("|".join([*CASES, r"\p{N}"]) + CASES_REST,), True, True)
_GPT4O = Splits(("|".join([f"{case}{CONTRACTIONS}?" for case in CASES] + [r"\p{N}{1,3}"]) + CASES_REST,))
_QWEN35 = Splits((CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
                  + REST.replace(r"\s\p{L}", r"\s\p{L}\p{M}"),))
_SEED = Splits((WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",))
_DEEPSEEK = Splits((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))
_DEFAULT = Splits((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
PRE = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mellum", "roberta-bpe", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _THREES),
    "tekken": _TEKKEN, "qwen35": _QWEN35, "seed-coder": _SEED, "deepseek-coder": _DEEPSEEK,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str | None) -> Tokenizer:
    """Byte-level BPE with the splits that `pre` names. ValueError for another name, or broken merges."""
    if pre not in PRE:
        raise ValueError(f"its pre-tokeniser {pre!r} is unknown (known: {', '.join(PRE)}), and "
                         "another would split text differently than the model was trained on")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs) if len(pair) != 2]:
        raise ValueError(f"its tokenizer's merge {wrong[0]!r} is not two tokens with a space between")
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs,
                           ignore_merges=PRE[pre].whole_words)
    except Exception as error:               # of a merge whose parts are no tokens
        raise ValueError(f"its tokenizer's merges do not fit its tokens: {error}") from error
    backend = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in PRE[pre].expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def opens_with_bos(pre: str) -> bool:
    """Does a text begin with bos where the file does not say?"""
    return PRE[pre].bos
