"""Files that are broken in every way: not JSON, not text, too deep, too large, folders where files belong."""
import json
import random
from functools import partial

from tests.model.foreign.judge import Case, seed
from tests.model.foreign.kinds import write_text
from tests.model.foreign.models import raw, same_logits, write_model
from tests.model.foreign.texts import judge_text
from tests.model.foreign.weights import POINTER

CONTENTS = {
    "empty": b"",
    "space": b" \n",
    "brace": b"{",
    "null": b"null",
    "number": b"7",
    "list": b"[1, 2]",
    "string": b'"x"',
    "pointer": POINTER.encode(),
    "binary": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"a": "\xe9"}'.encode("latin-1"),
    "bom": b"\xef\xbb\xbf{}",
    "deep": b"[" * 10**5,
    "deep object": b'{"a":' * 10**5,
    "nul": b"\0" * 100,
    "html": b"<html>404</html>",
    "object": b"{}",
    "trailing comma": b'{"a": 1,}',
    "comment": b'{"a": 1} // x',
    "long number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "twice": b"{}{}",
    "surrogate": b'{"model_type": "\\ud800"}',
    "huge string": b'{"x": "' + b"y" * 10**7 + b'"}',
}
NAMES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "chat_template.json",
)


def broken_cases() -> list[Case]:
    """Each file replaced, cut, with a bit flipped, a folder; and tokenizer.json with wrong values inside."""
    writer = partial(write_text, kind="gpt2")
    made = [
        _case(f"{name} {what}", writer, partial(_replace, name=name, data=data))
        for name in NAMES
        for what, data in CONTENTS.items()
    ]
    made += [_case(f"{name} a folder", writer, partial(_as_folder, name=name)) for name in NAMES]
    made += [
        _case(f"{name} cut {n}", writer, partial(_cut, name=name, part=n / 8))
        for n in range(1, 8)
        for name in ("config.json", "tokenizer.json")
    ]
    made += [
        _case(f"{name} flip {n}", writer, partial(_flip, name=name, case=f"{name}{n}"))
        for n in range(40)
        for name in ("config.json", "tokenizer.json")
    ]
    made += [
        _case(
            f"tokenizer.json {'.'.join(where)} = {value!r}", writer, partial(_set, where=where, value=value)
        )
        for where in SPOTS
        for value in (None, 7, "x", [], {}, -1, 10**30, [7], {"type": "Nothing"})
    ]
    return made


SPOTS = [
    ("model",),
    ("model", "type"),
    ("model", "vocab"),
    ("model", "merges"),
    ("model", "unk_token"),
    ("added_tokens",),
    ("normalizer",),
    ("pre_tokenizer",),
    ("post_processor",),
    ("decoder",),
    ("version",),
    ("truncation",),
    ("padding",),
]


def _case(name, writer, change):
    def make(folder):
        write_model(folder, raw("llama"), build=False)
        writer(folder)
        change(folder)

    return Case(f"broken {name}", make, _judge)


def _judge(folder):
    same_logits(folder)
    return judge_text(folder)


def _replace(folder, name, data):
    (folder / name).write_bytes(data)


def _as_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def _cut(folder, name, part):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * part)])


def _flip(folder, name, case):
    data, draws = bytearray((folder / name).read_bytes()), random.Random(seed(case))
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    (folder / name).write_bytes(data)


def _set(folder, where, value):
    whole = json.loads((folder / "tokenizer.json").read_text())
    inner = whole
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (folder / "tokenizer.json").write_text(json.dumps(whole))
