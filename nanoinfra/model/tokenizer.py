"""The tokenizer that came with a model: text to ids, ids to text, and the ids that end an answer.

Opened from a Hugging Face folder by hf_text.py, or built from a GGUF file by gguf_text.py. Chat templates are
jinja2 programs written by whoever made the model; transformers' own renderer runs them, in its sandbox. Feeds
serve/generate.py and the server; training tokenizers live in data/.
"""
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Tokenizer

from nanoinfra.model.weights import import_transformers

CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
            " 've": "'ve", " 're": "'re"}    # to be replaced one after another, as transformers does

# decoders, of which none changes text that lies further back than the last token, or the last run of bytes
LOCAL = re.compile("|ByteLevel|Metaspace|WordPiece|BPEDecoder|((Replace|ByteFallback) ?)*(Fuse( Strip)?)?")


@dataclass(frozen=True)
class Text:
    """`backend` with what it does not know: the ids that end a text, and the names templates ask for."""
    backend: Tokenizer
    ends: frozenset[int] = frozenset()       # ids that end a generation
    bos: str = ""                            # names of the first and last token, as chat templates spell them
    eos: str = ""
    named: dict[str, str] = field(default_factory=dict)      # other special tokens: {"pad_token": "<pad>"}
    clean_up: bool = False                   # CLEAN_UP what is decoded
    split_special: bool = False              # special tokens spelled in a text are plain text

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of `text`, special tokens recognised by name; with `begin`, opened as the model was trained.

        Raises ValueError for what the tokenizer has no ids for: half a surrogate pair, an unknown word.
        """
        try:
            with import_transformers.panics_as_errors():     # in a batch, for other threads go on then
                return self.backend.encode_batch([text], add_special_tokens=begin)[0].ids
        except Exception as error:           # TypeError for surrogates, Exception for the rest
            why = "half of a surrogate pair is no text" if isinstance(error, TypeError) else error
            raise ValueError(f"the model's tokenizer does not take this text: {why}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        with import_transformers.panics_as_errors():
            text = self.backend.decode(list(ids), skip_special_tokens=True)
        for old, new in CLEAN_UP.items() if self.clean_up else ():
            text = text.replace(old, new)
        return text

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it: no token stands for more."""
        return max(map(len, self.backend.get_vocab()))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """What `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens that stand for their names, letter by letter, whatever the decoder does to others."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def is_byte_level(self) -> bool:
        """Does each letter of a token's name stand for a byte?"""
        return any(each["type"] == "ByteLevel" for each in self._decoders)

    @cached_property
    def is_local(self) -> bool:
        """Is a token's text settled once the next one's is known, or a character or run of bytes ends?"""
        last = (self._decoders or [{}])[-1]  # Strip: what is more than one may be others' text
        strips = last.get("start", 0) > 1 or last.get("stop", 0) > 0
        names = " ".join(each["type"] for each in self._decoders)
        return not strips and LOCAL.fullmatch(names) is not None

    @cached_property
    def has_bytes(self) -> bool:
        """Are there tokens that stand for a byte, several of them for a character?"""
        return any(each["type"] == "ByteFallback" for each in self._decoders)

    @cached_property
    def anchor(self) -> list[int]:
        """Ids of a plain text, to decode others behind; none where no token ends in a letter or digit."""
        for i in range(self.backend.get_vocab_size()):
            spelled = self.backend.id_to_token(i)
            if not (spelled is None or i in self.special_ids or spelled.startswith("<0x")):
                if re.fullmatch("[ -~]*[0-9A-Za-z]", self.backend.decode([i])):
                    return [i]
        return []

    @cached_property
    def _decoders(self):
        """tokenizer.json's decoder, as a list of its parts."""
        if self.backend.decoder is None:
            return []
        found = json.loads(self.backend.decoder.__getstate__())
        return found["decoders"] if found["type"] == "Sequence" else [found]

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by the names that templates and tokenizer_config.json have for them."""
        ours = {"bos_token": self.bos, "eos_token": self.eos}
        return {name: token for name, token in ours.items() if token} | self.named

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.split_special:               # not in what a pickled tokenizer keeps
            self.backend.encode_special_tokens = True


def render_chat(template: str, messages: list[dict], text: Text, tools: list[dict] | None = None) -> str:
    """`messages` ({role, content} each) as one prompt, opened for the assistant's turn.

    `tools` are OpenAI's, for a template that has a place for them. What the template sees is what
    transformers' apply_chat_template(messages, tools) shows it, of which what is None is left out. Encode it
    with `begin=False`: the template writes its own first token. Raises ValueError for a template that is not
    valid jinja2, that refuses the messages, or that reaches for what the sandbox forbids.
    """
    render = renderer()
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return render(conversations=[said], tools=tools, chat_template=template,
                      add_generation_prompt=True, **text.special_tokens)[0][0]
    except Exception as error:               # a template may fail in every way a program can
        raise ValueError("the model's chat template cannot render these messages: "
                         f"{import_transformers.in_one_line(error)}") from error


def renderer():
    """transformers' function that renders chat templates. ValueError where the hub extra is not installed."""
    import_transformers.transformers("chat templates")
    import_transformers.optional("jinja2", "chat templates")
    from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template
