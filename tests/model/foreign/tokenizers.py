"""Tokenizers of every kind, trained on a few lines here, with what files say around them; text both ways.

A kind is (tokenizers' own Tokenizer, the special tokens and class that tokenizer_config.json names). A change
edits the two as JSON.  Equal means: encoded with and without special tokens, decoded, and shown token by
token, exactly as transformers' AutoTokenizer says.
"""
import json
from collections.abc import Callable
from functools import cache, partial

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from transformers import AutoTokenizer, GenerationConfig

from nanoinfra.model.load import load
from nanoinfra.serve.writer import Stream
from tests.model.foreign.judge import Case, Fault, ours, same
from tests.model.foreign.models import raw, write_model
from tests.model.foreign.strings import hundred, id_lists
from tests.model.foreign.weights import POINTER

LINES = ["The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x**2\n", "Hello world, hello there! " * 3,
         "naïve café — résumé", "日本語のテキスト 中文 한국어", "привет мир", "1234567890 3.14", "😀👍 a€b", "don't I'll we've"]
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(split=None, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), prefix_space=False, normal=None):
    made = Tokenizer(models.BPE())
    made.normalizer = normal
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split is None)
    made.pre_tokenizer = level if split is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return _trained(made, trainers.BpeTrainer(vocab_size=420, special_tokens=list(specials), show_progress=False,
                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def _sentencepiece(model=models.BPE, prepend=True, fallback=True):
    """Llama-2's: ▁ for a space, bytes where a character is unknown."""
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    if model is models.BPE:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials, show_progress=False)
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=480, special_tokens=specials, unk_token="<unk>",
                                          show_progress=False)
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    _trained(made, trainer)
    whole = json.loads(made.to_str())        # bytes are ordinary tokens, and the first three special
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in BYTES]
    whole["model"]["byte_fallback"] = fallback
    made = Tokenizer.from_str(json.dumps(whole))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    return _begun(made, "<s>")


def _begun(made, first):
    made.post_processor = processors.TemplateProcessing(f"{first} $A", f"{first} $A {first}:1 $B:1", [
        (first, made.token_to_id(first))])
    return made


def _metaspace(scheme, model=models.Unigram):
    made = Tokenizer(model() if model is models.Unigram else model(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.normalizer = normalizers.NFKC()
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    return _trained(made, trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>",
                                                  show_progress=False) if model is models.Unigram else
                    trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False))


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
    return _trained(made, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))


def _letters():
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return _trained(made, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"],
                                              show_progress=False))


def _suffixed():
    """OpenAI GPT's: </w> ends a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder("</w>")
    return _trained(made, trainers.BpeTrainer(vocab_size=250, special_tokens=["<unk>", "<s>", "</s>"],
                                              end_of_word_suffix="</w>", show_progress=False))


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
ASKED = {"local_files_only": True, "trust_remote_code": False}
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict]] = {
    "gpt2": (_byte_level, ENDOFTEXT | {"tokenizer_class": "GPT2Tokenizer"}),
    "gpt2 fast": (_byte_level, ENDOFTEXT | FAST),
    "prefix space": (partial(_byte_level, prefix_space=True), ENDOFTEXT | FAST | {"add_prefix_space": True}),
    "llama3": (lambda: _begun(_byte_level(LLAMA3_SPLIT), "<|endoftext|>"), {**FAST, **ENDOFTEXT, "unk_token": None}),
    "qwen2": (partial(_byte_level, QWEN_SPLIT, normal=normalizers.NFC()), CHATML | {"tokenizer_class": "Qwen2Tokenizer"}),
    "qwen2 fast": (partial(_byte_level, QWEN_SPLIT, normal=normalizers.NFC()), CHATML | FAST),
    "opt": (lambda: _begun(_byte_level(specials=["<s>", "<pad>", "</s>", "<unk>"]), "</s>"), {
        "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", **FAST}),
    "bloom": (partial(_byte_level, r" ?[^(\s|[.,!?…。，、।۔،])]+", ["<unk>", "<s>", "</s>", "<pad>"]), {
        **LLAMA, "pad_token": "<pad>", "tokenizer_class": "BloomTokenizerFast"}),
    "llama2": (_sentencepiece, LLAMA | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "llama2 fast": (_sentencepiece, LLAMA | FAST),
    "llama2 legacy": (_sentencepiece, LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
    "gemma": (partial(_sentencepiece, prepend=False), LLAMA | FAST),
    "unigram bytes": (partial(_sentencepiece, model=models.Unigram), LLAMA | FAST),
    "no fallback": (partial(_sentencepiece, fallback=False), LLAMA | FAST),
    "mistral": (lambda: _begun(_metaspace("first", models.BPE), "<s>"), LLAMA | FAST),
    "unigram": (partial(_metaspace, "always"), {**LLAMA, "pad_token": "<pad>", **FAST}),
    "unigram never": (partial(_metaspace, "never"), LLAMA | FAST),
    "wordpiece": (_wordpiece, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]",
                               "mask_token": "[MASK]", "tokenizer_class": "BertTokenizer"}),
    "wordpiece cased": (partial(_wordpiece, False), {"unk_token": "[UNK]", "eos_token": "[SEP]", **FAST}),
    "words": (_words, LLAMA | FAST), "letters": (_letters, LLAMA | FAST), "suffixed": (_suffixed, LLAMA | FAST),
    "phi3": (lambda: _with(_sentencepiece(), *(AddedToken(name, rstrip=True, special=True, normalized=False) for name in
                           ("<|user|>", "<|assistant|>", "<|end|>"))), LLAMA | {"eos_token": "<|end|>"} | FAST),
    "added": (lambda: _with(_byte_level(), AddedToken("<tool>", lstrip=True, rstrip=True, special=False),
                            AddedToken("fox", single_word=True, special=False), AddedToken("  ", normalized=False,
                            special=False), AddedToken("résumé", special=False)), ENDOFTEXT | FAST),
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


WRITERS = {kind: partial(write_text, kind=kind) for kind in KINDS}


def text_cases() -> list[Case]:
    """Every kind as it is and with every change; folders without tokenizer.json."""
    made = [_case(kind, partial(write_text, kind=kind), must=True) for kind in KINDS]
    made += [_case(f"{kind}, {name}", partial(write_text, kind=kind, change=change))
             for kind in KINDS for name, change in CHANGES.items()]
    made += [_case(f"{kind}, {name}", partial(_beside, kind=kind, files=files))
             for kind in ("gpt2", "llama2", "llama3", "qwen2") for name, files in BESIDE.items()]
    return made + [_case(f"slow {name}", partial(_beside, kind=None, files=files)) for name, files in SLOW.items()]


def _case(name, write, must=False):
    def make(folder):
        write_model(folder, raw("llama", vocab_size=700), build=True)
        write(folder)
    return Case(f"text {name}", make, judge_text, _reads_there, must)


def judge_text(folder) -> str:
    """The judge of a folder's text."""
    _, text, _ = ours(load, folder)
    try:
        other = AutoTokenizer.from_pretrained(folder, **ASKED)
    except Exception as error:
        if text is None:
            return "equal"
        raise Fault(f"opened, where transformers fails: {type(error).__name__}: {str(error)[:120]}") from error
    if text is None:
        raise Fault("no tokenizer, where transformers has one")
    special = sorted(other.all_special_ids)
    lists = id_lists(len(other), special)
    for string in hundred():
        for begin in (True, False):
            want = other(string, add_special_tokens=begin)["input_ids"]
            same(ours(text.encode, string, begin), want, f"ids of {string!r} (begin={begin})")
        lists.append(want)
    for ids in lists:
        whole = other.decode(ids, skip_special_tokens=True)
        same(ours(text.decode, ids), whole, f"the text of {ids[:20]}")
        same(ours(streamed, text, ids), whole, f"the text of {ids[:20]}, streamed")
    _judge_ends(folder, text, other)
    return "equal"


def _judge_ends(folder, text, other):
    """Every id that ends an answer there ends one here."""
    try:
        said = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        said = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    ends = {said} if isinstance(said, int) else set(said or ())
    if missing := (ends | {other.eos_token_id}) - {None} - set(text.ends):
        raise Fault(f"ids {missing} do not end an answer")


def streamed(text, ids) -> str:
    """The text of `ids` shown token by token."""
    stream = Stream(text)
    return "".join([stream.push(token) for token in ids] + [stream.finish()])


def _reads_there(folder):
    try:
        AutoTokenizer.from_pretrained(folder, **ASKED)("a b")
        return True
    except Exception:
        return False


def _set(**given):
    return lambda whole, config: config.update(given)


def _whole(**given):
    return lambda whole, config: whole.update(given)


def _gone(*keys):
    def change(whole, config):
        for key in keys:
            config.pop(key, None)
    return change


def _decoder_table(whole, config):
    config["added_tokens_decoder"] = {str(token["id"]): {key: token[key] for key in token if key != "id"}
                                      for token in whole["added_tokens"]}


def _new_special(whole, config):
    config["added_tokens_decoder"] = {str(len(whole["model"]["vocab"])): {
        "content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<pad>"}
CHANGES = {
    "truncation": _whole(truncation=TRUNCATION), "padding": _whole(padding=PADDING),
    "padding longest": _whole(padding=PADDING | {"strategy": "BatchLongest"}),
    "model_max_length": _set(model_max_length=4), "bos added": _set(add_bos_token=True),
    "bos not added": _set(add_bos_token=False), "eos added": _set(add_eos_token=True),
    "both added": _set(add_bos_token=True, add_eos_token=True), "prefix space": _set(add_prefix_space=True),
    "no prefix space": _set(add_prefix_space=False), "cleaned up": _set(clean_up_tokenization_spaces=True),
    "not cleaned up": _set(clean_up_tokenization_spaces=False), "no class": _gone("tokenizer_class"),
    "auto class": _set(tokenizer_class="TokenizersBackend"), "unknown class": _set(tokenizer_class="XTokenizer"),
    "llama class": _set(tokenizer_class="LlamaTokenizer"), "gpt2 class": _set(tokenizer_class="GPT2TokenizerFast"),
    "legacy": _set(legacy=True), "not legacy": _set(legacy=False), "split specials": _set(split_special_tokens=True),
    "left": _set(padding_side="left", truncation_side="left"), "no names": _gone("bos_token", "eos_token", "unk_token"),
    "names as objects": _set(eos_token={"content": "</s>", "lstrip": True, "rstrip": False, "normalized": True,
                                        "single_word": False, "__type": "AddedToken"}),
    "unknown eos": _set(eos_token="<nowhere>"), "additional": _set(additional_special_tokens=["fox", "<extra>"]),
    "extra": _set(extra_special_tokens={"image_token": "<image>"}), "extra list": _set(extra_special_tokens=["<e>"]),
    "decoder table": _decoder_table, "new special": _new_special, "eos a number": _set(eos_token=7),
    "eos a list": _set(eos_token=["</s>"]), "bos true": _set(bos_token=True), "no post-processor": _whole(
        post_processor=None), "no decoder": _whole(decoder=None), "slow": _set(use_fast=False),
    "spaces between": _set(spaces_between_special_tokens=True), "auto_map": _set(auto_map={"AutoTokenizer": ["x.X", None]}),
    "sp kwargs": _set(sp_model_kwargs={"enable_sampling": True}), "errors": _set(errors="ignore"),
}
BESIDE = {
    "eos list": {"generation_config.json": '{"eos_token_id": [2, 1, 5]}'},
    "eos one": {"generation_config.json": '{"eos_token_id": 5}'},
    "no config": {"tokenizer_config.json": None}, "specials beside": {
        "special_tokens_map.json": '{"eos_token": "x", "pad_token": "y"}'},
    "added beside": {"added_tokens.json": '{"<beside>": 699}'}, "pointer": {"tokenizer.json": POINTER},
    "config pointer": {"tokenizer_config.json": POINTER},
    "too large": {"added_tokens.json": '{"<far>": 5000}'}, "model": {"tokenizer.model": "x"},
}
VOCAB = json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "\u0120": 4, "c": 5})
SLOW = {
    "none": {}, "gpt2": {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\na b\n", "tokenizer_config.json":
                         '{"tokenizer_class": "GPT2Tokenizer"}'},
    "gpt2 no config": {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\na b\n"},
    "bert": {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n", "tokenizer_config.json":
             '{"tokenizer_class": "BertTokenizer"}'},
    "byt5": {"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'},
    "canine": {"tokenizer_config.json": '{"tokenizer_class": "CanineTokenizer"}'},
    "ctrl": {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\na b\n", "tokenizer_config.json":
             '{"tokenizer_class": "CTRLTokenizer"}'},
    "sentencepiece": {"tokenizer.model": "\n\x05x", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
    "tiktoken": {"tokenizer.model": "YQ== 0\nYg== 1\nYWI= 2\n"}, "tekken": {"tekken.json": '{"vocab": []}'},
    "qwen": {"vocab.json": VOCAB, "merges.txt": "a b\n", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
    "remote": {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}', "tok.py": "1/0"},
    "config only": {"tokenizer_config.json": "{}"}, "specials only": {"special_tokens_map.json": "{}"},
}


def _beside(folder, kind, files):
    if kind:
        write_text(folder, kind)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
