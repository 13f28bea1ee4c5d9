"""Every kind of tokenizer with what files say around it, and folders without tokenizer.json; text both ways.

A change edits tokenizer.json and tokenizer_config.json. Equal means: encoded with and without special tokens,
decoded, and shown token by token, exactly as transformers' AutoTokenizer says.
"""
import json
from functools import partial

from transformers import AutoTokenizer, GenerationConfig

from nanoinfra.model.weights.load_model import load_model
from nanoinfra.serve.engine.detokenizer import IncrementalDetokenizer
from tests.model.foreign.judge import Case, Fault, ours, same
from tests.model.foreign.kinds import KINDS, write_text
from tests.model.foreign.models import raw, write_model
from tests.model.foreign.strings import hundred, id_lists
from tests.model.foreign.weights import POINTER

ASKED = {"local_files_only": True, "trust_remote_code": False}


def text_cases() -> list[Case]:
    """Every kind as it is and with every change; folders without tokenizer.json."""
    made = [_case(kind, partial(write_text, kind=kind), must=True) for kind in KINDS]
    made += [
        _case(f"{kind}, {name}", partial(write_text, kind=kind, change=change))
        for kind in KINDS
        for name, change in CHANGES.items()
    ]
    made += [
        _case(f"{kind}, {name}", partial(_beside, kind=kind, files=files))
        for kind in ("gpt2", "llama2", "llama3", "qwen2")
        for name, files in BESIDE.items()
    ]
    return made + [
        _case(f"slow {name}", partial(_beside, kind=None, files=files)) for name, files in SLOW.items()
    ]


def _case(name, write, must=False):
    def make(folder):
        write_model(folder, raw("llama", vocab_size=700), build=True)
        write(folder)

    return Case(f"text {name}", make, judge_text, _reads_there, must)


def judge_text(folder) -> str:
    """The judge of a folder's text."""
    _, text, _ = ours(load_model, folder)
    try:
        other = AutoTokenizer.from_pretrained(folder, **ASKED)
    except Exception as error:
        if text is None:
            return "equal"
        raise Fault(f"opened, where transformers fails: {str(error)[:150] or type(error)}") from error
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
    if missing := (ends | {other.eos_token_id}) - {None} - set(text.eos_token_ids):
        raise Fault(f"ids {missing} do not end an answer")


def streamed(text, ids) -> str:
    """The text of `ids` shown token by token."""
    stream = IncrementalDetokenizer(text)
    return "".join([stream.push_token(token) for token in ids] + [stream.flush()])


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
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in whole["added_tokens"]
    }


def _new_special(whole, config):
    config["added_tokens_decoder"] = {
        str(len(whole["model"]["vocab"])): {
            "content": "<new>",
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
    }


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 16},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
CHANGES = {
    "truncation": _whole(truncation=TRUNCATION),
    "padding": _whole(padding=PADDING),
    "padding longest": _whole(padding=PADDING | {"strategy": "BatchLongest"}),
    "model_max_length": _set(model_max_length=4),
    "bos added": _set(add_bos_token=True),
    "bos not added": _set(add_bos_token=False),
    "eos added": _set(add_eos_token=True),
    "both added": _set(add_bos_token=True, add_eos_token=True),
    "prefix space": _set(add_prefix_space=True),
    "no prefix space": _set(add_prefix_space=False),
    "cleaned up": _set(clean_up_tokenization_spaces=True),
    "not cleaned up": _set(clean_up_tokenization_spaces=False),
    "no class": _gone("tokenizer_class"),
    "auto class": _set(tokenizer_class="TokenizersBackend"),
    "unknown class": _set(tokenizer_class="XTokenizer"),
    "llama class": _set(tokenizer_class="LlamaTokenizer"),
    "gpt2 class": _set(tokenizer_class="GPT2TokenizerFast"),
    "legacy": _set(legacy=True),
    "not legacy": _set(legacy=False),
    "split specials": _set(split_special_tokens=True),
    "left": _set(padding_side="left", truncation_side="left"),
    "no names": _gone("bos_token", "eos_token", "unk_token"),
    "names as objects": _set(
        eos_token={
            "content": "</s>",
            "lstrip": True,
            "rstrip": False,
            "normalized": True,
            "single_word": False,
            "__type": "AddedToken",
        }
    ),
    "unknown eos": _set(eos_token="<nowhere>"),
    "additional": _set(additional_special_tokens=["fox", "<extra>"]),
    "extra": _set(extra_special_tokens={"image_token": "<image>"}),
    "extra list": _set(extra_special_tokens=["<e>"]),
    "decoder table": _decoder_table,
    "new special": _new_special,
    "eos a number": _set(eos_token=7),
    "eos a list": _set(eos_token=["</s>"]),
    "bos true": _set(bos_token=True),
    "no post-processor": _whole(post_processor=None),
    "no decoder": _whole(decoder=None),
    "slow": _set(use_fast=False),
    "spaces between": _set(spaces_between_special_tokens=True),
    "auto_map": _set(auto_map={"AutoTokenizer": ["x.X", None]}),
    "sp kwargs": _set(sp_model_kwargs={"enable_sampling": True}),
    "errors": _set(errors="ignore"),
}
BESIDE = {
    "eos list": {"generation_config.json": '{"eos_token_id": [2, 1, 5]}'},
    "eos one": {"generation_config.json": '{"eos_token_id": 5}'},
    "no config": {"tokenizer_config.json": None},
    "specials beside": {"special_tokens_map.json": '{"eos_token": "x", "pad_token": "y"}'},
    "added beside": {"added_tokens.json": '{"<beside>": 699}'},
    "pointer": {"tokenizer.json": POINTER},
    "config pointer": {"tokenizer_config.json": POINTER},
    "too large": {"added_tokens.json": '{"<far>": 5000}'},
    "model": {"tokenizer.model": "x"},
}
VOCAB = json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "\u0120": 4, "c": 5})
SLOW = {
    "none": {},
    "gpt2": {
        "vocab.json": VOCAB,
        "merges.txt": "#version: 0.2\na b\n",
        "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}',
    },
    "gpt2 no config": {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\na b\n"},
    "bert": {
        "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n",
        "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}',
    },
    "byt5": {"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'},
    "canine": {"tokenizer_config.json": '{"tokenizer_class": "CanineTokenizer"}'},
    "ctrl": {
        "vocab.json": VOCAB,
        "merges.txt": "#version: 0.2\na b\n",
        "tokenizer_config.json": '{"tokenizer_class": "CTRLTokenizer"}',
    },
    "sentencepiece": {
        "tokenizer.model": "\n\x05x",
        "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}',
    },
    "tiktoken": {"tokenizer.model": "YQ== 0\nYg== 1\nYWI= 2\n"},
    "tekken": {"tekken.json": '{"vocab": []}'},
    "qwen": {
        "vocab.json": VOCAB,
        "merges.txt": "a b\n",
        "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}',
    },
    "remote": {
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}',
        "tok.py": "1/0",
    },
    "config only": {"tokenizer_config.json": "{}"},
    "specials only": {"special_tokens_map.json": "{}"},
}


def _beside(folder, kind, files):
    if kind:
        write_text(folder, kind)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
