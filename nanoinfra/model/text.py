"""The tokenizer that came with a model: text to ids, ids to text, and the ids that end an answer.

Read from a Hugging Face folder (tokenizer.json beside its two configs), or built from a GGUF file. Chat
templates are jinja2 programs written by whoever made the model, so they run in jinja2's immutable sandbox.
Feeds serve/generate.py and the server; training tokenizers live in data/.
"""
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Text:
    """`backend` with what it does not know: the ids that end a text, and the names templates ask for."""
    backend: Tokenizer
    ends: frozenset[int] = frozenset()       # ids that end a generation
    bos: str = ""                            # names of the first and last token, as chat templates spell them
    eos: str = ""

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of `text`, special tokens recognised by name; with `begin`, opened as the model was trained."""
        return self.backend.encode_batch([text], add_special_tokens=begin)[0].ids    # other threads go on

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it: no token stands for more."""
        return max(map(len, self.backend.get_vocab()))


def read_text(folder: str | Path) -> Text | None:
    """The tokenizer of a Hugging Face folder, or None where it holds no tokenizer.json."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return None
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = read_json(folder / "tokenizer_config.json")
    bos, eos = (_content(names.get(key)) for key in ("bos_token", "eos_token"))
    ends = {backend.token_to_id(eos)} if eos else set()
    for config in ("generation_config.json", "config.json"):
        given = read_json(folder / config).get("eos_token_id")
        ends |= set(given if isinstance(given, list) else [given])
    return Text(backend, frozenset(ends - {None}), bos, eos)


def read_template(folder: str | Path) -> str | None:
    """The chat template of a Hugging Face folder: chat_template.jinja, or else tokenizer_config.json's."""
    path = Path(folder, "chat_template.jinja")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = read_json(Path(folder, "tokenizer_config.json")).get("chat_template")
    if isinstance(given, list):                                           # several, by name
        given = {one["name"]: one["template"] for one in given}.get("default")
    return given


def render_chat(template: str, messages: list[dict], text: Text) -> str:
    """`messages` ({role, content} each) as one prompt, opened for the assistant's turn.

    Encode it with `begin=False`: the template writes its own first token. Raises ValueError for a template
    that is not valid jinja2, that refuses the messages, or that reaches for what the sandbox forbids.
    """
    jinja2 = optional("jinja2", "chat templates")
    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=True, bos_token=text.bos, eos_token=text.eos)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template cannot render these messages: {error}") from error


@lru_cache(maxsize=4)                        # compiling takes longer than most chats
def _compiled(template):
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    sandbox.globals["raise_exception"] = refuse
    return sandbox.from_string(template)


def optional(package: str, purpose: str):
    """Import a package of the hub extra; ValueError naming the extra where it is not installed."""
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} need the package {package}; pip install 'nanoinfra[hub]'") from error


def read_json(path: Path) -> dict:
    """The JSON object in `path`, {} where there is no such file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        got = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(got, dict):
        raise ValueError(f"{path} holds a {type(got).__name__} where a JSON object belongs")
    return got


def _content(token):
    return (token["content"] if isinstance(token, dict) else token) or ""
