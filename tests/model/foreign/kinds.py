"""Tokenizers of every kind that models come with, trained on a few lines here.

A kind is (tokenizers' own Tokenizer, the special tokens and the class that tokenizer_config.json names).
"""
import json
from collections.abc import Callable
from functools import cache, partial

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x**2\n",
    "Hello world, hello there! " * 3,
    "naïve café — résumé",
    "日本語のテキスト 中文 한국어",
    "привет мир",
    "1234567890 3.14",
    "😀👍 a€b",
    "don't I'll we've",
]
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(
    split=None, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), prefix_space=False, normal=None
):
    made = Tokenizer(models.BPE())
    made.normalizer = normal
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split is None)
    made.pre_tokenizer = (
        level
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return _trained(
        made,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=list(specials),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )


def _sentencepiece(model=models.BPE, prepend=True, fallback=True):
    """Llama-2's: ▁ for a space, bytes where a character is unknown."""
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    if model is models.BPE:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials, show_progress=False)
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=480, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    _trained(made, trainer)
    whole = json.loads(made.to_str())  # bytes are ordinary tokens, and the first three special
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in BYTES]
    whole["model"]["byte_fallback"] = fallback
    made = Tokenizer.from_str(json.dumps(whole))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    return _begun(made, "<s>")


def _begun(made, first):
    made.post_processor = processors.TemplateProcessing(
        f"{first} $A", f"{first} $A {first}:1 $B:1", [(first, made.token_to_id(first))]
    )
    return made


def _metaspace(scheme, model=models.Unigram):
    made = Tokenizer(model() if model is models.Unigram else model(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.normalizer = normalizers.NFKC()
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    return _trained(
        made,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        if model is models.Unigram
        else trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False),
    )


def _wordpiece(lower=True):
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _trained(made, trainers.WordPieceTrainer(vocab_size=250, special_tokens=specials, show_progress=False))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def _words():
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(
        made, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )


def _letters():
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return _trained(
        made,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )


def _suffixed():
    """OpenAI GPT's: </w> ends a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder("</w>")
    return _trained(
        made,
        trainers.BpeTrainer(
            vocab_size=250,
            special_tokens=["<unk>", "<s>", "</s>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )


def _trained(made, trainer):
    made.train_from_iterator(LINES * 4, trainer)
    return made


def _with(made, *added):
    made.add_tokens([token for token in added if not token.special])
    made.add_special_tokens([token for token in added if token.special])
    return made


ENDOFTEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict]] = {
    "gpt2": (_byte_level, ENDOFTEXT | {"tokenizer_class": "GPT2Tokenizer"}),
    "gpt2 fast": (_byte_level, ENDOFTEXT | FAST),
    "prefix space": (partial(_byte_level, prefix_space=True), ENDOFTEXT | FAST | {"add_prefix_space": True}),
    "llama3": (
        lambda: _begun(_byte_level(LLAMA3_SPLIT), "<|endoftext|>"),
        {**FAST, **ENDOFTEXT, "unk_token": None},
    ),
    "qwen2": (
        partial(_byte_level, QWEN_SPLIT, normal=normalizers.NFC()),
        CHATML | {"tokenizer_class": "Qwen2Tokenizer"},
    ),
    "qwen2 fast": (partial(_byte_level, QWEN_SPLIT, normal=normalizers.NFC()), CHATML | FAST),
    "opt": (
        lambda: _begun(_byte_level(specials=["<s>", "<pad>", "</s>", "<unk>"]), "</s>"),
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", **FAST},
    ),
    "bloom": (
        partial(_byte_level, r" ?[^(\s|[.,!?…。，、।۔،])]+", ["<unk>", "<s>", "</s>", "<pad>"]),
        {**LLAMA, "pad_token": "<pad>", "tokenizer_class": "BloomTokenizerFast"},
    ),
    "llama2": (_sentencepiece, LLAMA | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "llama2 fast": (_sentencepiece, LLAMA | FAST),
    "llama2 legacy": (_sentencepiece, LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
    "gemma": (partial(_sentencepiece, prepend=False), LLAMA | FAST),
    "unigram bytes": (partial(_sentencepiece, model=models.Unigram), LLAMA | FAST),
    "no fallback": (partial(_sentencepiece, fallback=False), LLAMA | FAST),
    "mistral": (lambda: _begun(_metaspace("first", models.BPE), "<s>"), LLAMA | FAST),
    "unigram": (partial(_metaspace, "always"), {**LLAMA, "pad_token": "<pad>", **FAST}),
    "unigram never": (partial(_metaspace, "never"), LLAMA | FAST),
    "wordpiece": (
        _wordpiece,
        {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "mask_token": "[MASK]",
            "tokenizer_class": "BertTokenizer",
        },
    ),
    "wordpiece cased": (partial(_wordpiece, False), {"unk_token": "[UNK]", "eos_token": "[SEP]", **FAST}),
    "words": (_words, LLAMA | FAST),
    "letters": (_letters, LLAMA | FAST),
    "suffixed": (_suffixed, LLAMA | FAST),
    "phi3": (
        lambda: _with(
            _sentencepiece(),
            *(
                AddedToken(name, rstrip=True, special=True, normalized=False)
                for name in ("<|user|>", "<|assistant|>", "<|end|>")
            ),
        ),
        LLAMA | {"eos_token": "<|end|>"} | FAST,
    ),
    "added": (
        lambda: _with(
            _byte_level(),
            AddedToken("<tool>", lstrip=True, rstrip=True, special=False),
            AddedToken("fox", single_word=True, special=False),
            AddedToken("  ", normalized=False, special=False),
            AddedToken("résumé", special=False),
        ),
        ENDOFTEXT | FAST,
    ),
}


@cache
def _spelled(kind):
    return KINDS[kind][0]().to_str()


def write_text(folder, kind: str, change: Callable[[dict, dict], None] | None = None) -> None:
    """tokenizer.json and tokenizer_config.json of a kind, changed."""
    whole, config = json.loads(_spelled(kind)), dict(KINDS[kind][1])
    if change:
        change(whole, config)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
