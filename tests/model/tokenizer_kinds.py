"""Tiny tokenizers of every kind that models bring, in folders as transformers or `tokenizers` write them."""
import functools
import json
import os

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

os.environ["HF_HUB_OFFLINE"] = "1"
CORPUS = ["the cat sat on the mat , didn't it ? i 've seen it . we 're here !",
          "def f(x):\n    return x + 1\n",
          "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e the end of the end",
          "2024 was 12 months ; the one 's two \ufffd"] * 4
GPT4 = (r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
BOS = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
EOS = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIP = decoders.Strip(" ", 1, 0)


def byte_level(prefix=False, split=(), normalizer=None, processor=None, use_regex=True):
    made = Tokenizer(models.BPE())
    made.normalizer, made.decoder = normalizer, decoders.ByteLevel()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, byte]) if split else byte
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if processor:
        made.post_processor = processor
    return made


def pieces(kind, normalizer=None, pre_tokenizer=None, decoder=None, processor=BOS, bytes=True, **more):
    """As sentencepiece does it: spaces are U+2581, and bytes stand for what no piece spells."""
    learn = Tokenizer(models.BPE(unk_token="<unk>") if kind is models.BPE else kind())
    learn.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL, *BYTES] if bytes else SPECIAL
    trainer = trainers.BpeTrainer if kind is models.BPE else trainers.UnigramTrainer
    how = {} if kind is models.BPE else {"unk_token": "<unk>"}
    texts = [text.replace("\u65e5\u672c\u8a9e", "") for text in CORPUS]
    how |= {"vocab_size": len(special) + 90, "special_tokens": special, "show_progress": False}
    learn.train_from_iterator(texts, trainer(**how))
    state = json.loads(learn.to_str())
    state["model"]["byte_fallback"] = bytes
    state["model"] |= more
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(state))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizer, decoder
    if processor:
        made.post_processor = processor
    return made


def llama2():
    begin = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return pieces(models.BPE, begin, None, decoders.Sequence([*LLAMA, STRIP]), fuse_unk=True)


def gemma():
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return pieces(models.BPE, normalizers.Replace(" ", "\u2581"), split, decoders.Sequence(LLAMA))


def metaspace(scheme, kind=models.BPE, processor=BOS, bytes=True):
    space = {"replacement": "\u2581", "prepend_scheme": scheme}
    decoder = decoders.Sequence([*LLAMA, STRIP]) if bytes else decoders.Metaspace(**space)
    split = pre_tokenizers.Metaspace(split=kind is not models.BPE, **space)
    return pieces(kind, None, split, decoder, processor, bytes)


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL,
                                                               show_progress=False))
    made.decoder = decoders.WordPiece()
    both = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=both)
    return made


def word_level(decoder=None):
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    made.decoder = decoder
    return made


def word_ends():
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=150, special_tokens=SPECIAL, show_progress=False, end_of_word_suffix="</w>"))
    made.decoder = decoders.BPEDecoder("</w>")
    return made


def added():
    made = byte_level()
    made.add_special_tokens([AddedToken("<|user|>", special=True, lstrip=True), "<|tool|>"])
    made.add_tokens([AddedToken("<think>", normalized=False),
                     AddedToken("sat", single_word=True, rstrip=True)])
    return made


def cut_short():
    made = byte_level(processor=BOS)
    made.enable_truncation(5)
    made.enable_padding(length=8, pad_id=3, pad_token="<pad>")
    return made


KINDS = {                                    # name: (tokenizer, tokenizer_config.json)
    "gpt2": (byte_level, {}),
    "gpt2 with prefix space": (lambda: byte_level(prefix=True), {"clean_up_tokenization_spaces": True}),
    "gpt2 class": (byte_level, {"tokenizer_class": "GPT2Tokenizer"}),
    "llama3": (lambda: byte_level(split=[pre_tokenizers.Split(Regex(GPT4), "isolated")], processor=BOS,
                                  use_regex=False), {}),
    "qwen2": (lambda: byte_level(split=[pre_tokenizers.Split(Regex(GPT4), "isolated")], use_regex=False,
                                 normalizer=normalizers.NFC()), {"tokenizer_class": "Qwen2Tokenizer"}),
    "llama2": (llama2, {}),
    "llama2 class": (llama2, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama2 adds eos": (llama2, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}),
    "gemma": (gemma, {}),
    "metaspace first": (lambda: metaspace("first"), {"additional_special_tokens": ["<|end|>"]}),
    "metaspace never": (lambda: metaspace("never"), {}),
    "unigram with bytes": (lambda: metaspace("always", models.Unigram), {"unk_token": "<unk>"}),
    "t5": (lambda: metaspace("always", models.Unigram, EOS, bytes=False),
           {"unk_token": "<unk>", "clean_up_tokenization_spaces": True}),
    "bert": (word_piece, {"unk_token": "<unk>", "clean_up_tokenization_spaces": True}),
    "bert class": (word_piece, {"tokenizer_class": "BertTokenizer", "unk_token": "<unk>", "cls_token": "<s>",
                                "sep_token": "</s>"}),
    "words": (word_level, {"unk_token": "<unk>"}),
    "words cleaned": (word_level, {"unk_token": "<unk>", "clean_up_tokenization_spaces": True}),
    "ends of words": (word_ends, {"unk_token": "<unk>"}),
    "added tokens": (added, {"extra_special_tokens": ["<|tool|>"]}),
    "special tokens split": (added, {"split_special_tokens": True}),
    "truncation and padding": (cut_short, {}),
    "far-reaching decoder": (lambda: _decoded(decoders.ByteLevel(), decoders.Replace("e ", "E")), {}),
    "ctc": (lambda: word_level(decoders.CTC("<pad>", "the", False)), {"unk_token": "<unk>"}),
}


def _decoded(*parts):
    made = byte_level()
    made.decoder = decoders.Sequence(list(parts))
    return made


@functools.cache
def _json(make):
    return make().to_str()


def save(name, folder, **config):
    """Write the kind `name` into `folder`, and config.json with `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    make, more = KINDS[name]
    (folder / "tokenizer.json").write_text(_json(make), encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast"} | NAMES | more
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


STRINGS = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "a", " a", "a ", "  a  b  ", "the cat sat",
    "The Cat SAT", "didn't it ? i 've seen . we 're", " ' ' ' ", " n't 'm 's", "a , b ! c .", "x  .",
    "hello , world", "end .", "na\u00efve caf\u00e9", "cafe\u0301", "e\u0301\u0302\u0303",
    "\u212b \ufb01 \uff21", "\u65e5\u672c\u8a9e", "\u4f60\u597d\uff0c\u4e16\u754c", "\ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627 abc",
    "\u202eabc\u202c", "\U0001f642", "a\U0001f642b\u20acc", "\U0001f642\U0001f642",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001d54f",
    "\ufffd", "a\ufffd", "\ufffd\ufffdb", "\u0000", "a\u0000b", "\u001b[0m", "\u007f", "\u0085", "\u00a0",
    "a\u00a0b", "\u2028", "\u200b", "\ufeff", "\u3000", "\u2581", "a\u2581b", "\u2581\u2581", "<s>", "</s>",
    "a</s>b", "<s>a", " </s> ", "<unk>", "<pad>", "<|end|>", "x <|end|> y", "<|end|>\n", "<|user|>hi",
    "<|tool|>", "<think>x</think>", "sat satsat sat", "<0x41>", "<0xE2>", "##a", "a##b", "</w>",
    "1234567890", "3.14", "2024-01-01", "0x1F", "a_b", "a-b", "x+=1;", "{'a': [1, 2]}", "\\n",
    "http://a.b/c?d=e", "def f(x):\n    return x\n", "\tif x:\n\t\ty", "a\n\n\nb", "...", "!!!", "?!", "''",
    "\"\"", "the " * 40, "a" * 300, "\U0001f642" * 30, " " * 50, "\n" * 20, "\u0301" * 9,
    "I'm you're we've they'll he'd", "\u00df\u017f\u0130\u0131", "\u01c5", "ab" * 64, "\u20ac" * 17]
