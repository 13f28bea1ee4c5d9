"""The tokenizer inside a GGUF file: byte-level BPE from its tokens and merges, split as its `pre` says.

Merges never cross a split, so a wrong pre-tokeniser gives other ids for the same text: SmolLM2 reads "2024"
as four digits. The file only names the rule (tokenizer.ggml.pre); known here are four that llama.cpp and
the models' own tokenizer.json agree on, any other is refused.
"""
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanoinfra.model.text import Text

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {                                     # GGUF's name -> the splits before the bytes
    "gpt-2": (),                            # ByteLevel's own expression
    "smollm": (pre_tokenizers.Digits(individual_digits=True),),
    "qwen2": (pre_tokenizers.Split(Regex(WORDS + r"\p{N}" + REST), "isolated"),),
    "llama-bpe": (pre_tokenizers.Split(Regex(WORDS + r"\p{N}{1,3}" + REST), "isolated"),),
}
OWN_WORDS = ("gpt-2", "smollm")             # these leave the words to ByteLevel's expression
CONTROL, USER_DEFINED = 3, 4                # tokenizer.ggml.token_type


def build_text(fields: dict) -> Text:
    """The tokenizer of an open GGUF file's `fields` ({key: function}). ValueError if unknown."""
    def get(key, default=None):
        return fields[f"tokenizer.ggml.{key}"]() if f"tokenizer.ggml.{key}" in fields else default

    if get("model") != "gpt2":
        raise ValueError(f"its tokenizer is a {get('model')!r}, but only byte-level BPE ('gpt2') is known")
    tokens, pre = get("tokens"), get("pre", "default")
    backend = byte_level_bpe(tokens, get("merges", []), pre)
    kinds = get("token_type", [])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                for token, kind in zip(tokens, kinds) if kind == CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False)
                        for token, kind in zip(tokens, kinds) if kind == USER_DEFINED])
    bos, eos = get("bos_token_id"), get("eos_token_id")
    if bos is not None and get("add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    ends = {eos, get("eot_token_id")} - {None}
    return Text(backend, frozenset(ends), *("" if i is None else tokens[i] for i in (bos, eos)))


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    """Byte-level BPE with the splits that `pre` names."""
    if pre not in PRE:
        raise ValueError(f"its pre-tokeniser {pre!r} is unknown (known: {', '.join(PRE)}), and "
                         "another would split text differently than the model was trained on")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs,
                                   ignore_merges=pre == "llama-bpe"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in OWN_WORDS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*PRE[pre], bytes_])
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    return backend
