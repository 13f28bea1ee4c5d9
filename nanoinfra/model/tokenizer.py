"""The tokenizer of a pretrained model: encode text, decode (detokenize) ids, EOS token ids, chat template.

It comes from a Hugging Face folder or from a GGUF file (model/weights/). Chat templates are jinja2 programs
by the model's authors; transformers renders them in its sandbox. Tokenizers are trained in data/.
"""
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import tokenizers

from nanoinfra.model.weights.call_transformers import (
    error_in_one_line,
    import_optional_package,
    import_transformers,
    rust_panics_as_errors,
)

CLEAN_UP_REPLACEMENTS = {                    # applied one after another, as transformers does
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
    " 've": "'ve", " 're": "'re"}

# Sequences of decoders that change no text before the last token or the last run of bytes.
_LOCAL_DECODERS = re.compile("|ByteLevel|Metaspace|WordPiece|BPEDecoder|"
                             "((Replace|ByteFallback) ?)*(Fuse( Strip)?)?")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` package, with its EOS ids and the special tokens of chat templates."""
    backend_tokenizer: tokenizers.Tokenizer
    eos_token_ids: frozenset[int] = frozenset()              # each of them ends a generation
    bos_token: str = ""                                      # the first and the last token, as chat templates
    eos_token: str = ""                                      # spell them
    other_special_tokens: dict[str, str] = field(default_factory=dict)     # {"pad_token": "<pad>"}
    clean_up_tokenization_spaces: bool = False               # apply CLEAN_UP_REPLACEMENTS to decoded text
    split_special_tokens: bool = False                       # special tokens spelled in a text are plain text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens in it are recognised by name.

        With `add_special_tokens` the ids begin (or end) with BOS (or EOS) as the model was trained. Raises
        ValueError for what the tokenizer has no ids for: half a surrogate pair, an unknown word.
        """
        try:
            with rust_panics_as_errors():    # as a batch, which lets other threads run
                found = self.backend_tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
                return found[0].ids
        except Exception as error:           # TypeError for surrogates, Exception for the rest
            why = "half of a surrogate pair is no text" if isinstance(error, TypeError) else error
            raise ValueError(f"the model's tokenizer does not take this text: {why}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Detokenize: the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        with rust_panics_as_errors():
            text = self.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        for old, new in CLEAN_UP_REPLACEMENTS.items() if self.clean_up_tokenization_spaces else ():
            text = text.replace(old, new)
        return text

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters of the vocabulary's longest token: no token decodes to more."""
        return max(map(len, self.backend_tokenizer.get_vocab()))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids of special tokens, which `decode` leaves out."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def added_token_ids(self) -> frozenset[int]:
        """The ids of added tokens: the decoder leaves their text as it is."""
        return frozenset(self.backend_tokenizer.get_added_tokens_decoder())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether it is a byte-level tokenizer: each letter of a token's name stands for a byte."""
        return any(each["type"] == "ByteLevel" for each in self._decoders)

    @cached_property
    def is_incrementally_decodable(self) -> bool:
        """Whether later tokens leave the text of earlier ones unchanged, so that a stream can be detokenized.

        A token's text is final once the next token is known, or once a character or a run of bytes ends.
        """
        last = (self._decoders or [{}])[-1]  # a Strip of more than one character can remove older text
        strips = last.get("start", 0) > 1 or last.get("stop", 0) > 0
        names = " ".join(each["type"] for each in self._decoders)
        return not strips and _LOCAL_DECODERS.fullmatch(names) is not None

    @cached_property
    def has_byte_fallback(self) -> bool:
        """Whether unknown characters are encoded as several byte tokens (<0xE2> and so on)."""
        return any(each["type"] == "ByteFallback" for each in self._decoders)

    @cached_property
    def decoding_prefix_ids(self) -> list[int]:
        """Ids of a plain text to decode other ids behind; empty where no token ends in a letter or digit."""
        for i in range(self.backend_tokenizer.get_vocab_size()):
            spelled = self.backend_tokenizer.id_to_token(i)
            if not (spelled is None or i in self.special_token_ids or spelled.startswith("<0x")):
                if re.fullmatch("[ -~]*[0-9A-Za-z]", self.backend_tokenizer.decode([i])):
                    return [i]
        return []

    @cached_property
    def _decoders(self):
        """The decoder of tokenizer.json, as a list of its parts."""
        if self.backend_tokenizer.decoder is None:
            return []
        found = json.loads(self.backend_tokenizer.decoder.__getstate__())
        return found["decoders"] if found["type"] == "Sequence" else [found]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Special tokens by the keys of chat templates and tokenizer_config.json: {"bos_token": "<s>"}."""
        ours = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {name: token for name, token in ours.items() if token} | self.other_special_tokens

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.split_special_tokens:        # a pickled backend loses this setting
            self.backend_tokenizer.encode_special_tokens = True


def apply_chat_template(chat_template: str, messages: list[dict], tokenizer: Tokenizer,
                        tools: list[dict] | None = None) -> str:
    """Render `messages` ({role, content} each) as one prompt that ends where the assistant's turn begins.

    `tools` are OpenAI's, for a template that uses them. The template gets the same values as from
    transformers' apply_chat_template(messages, tools), without keys that are None. Encode the prompt with
    `add_special_tokens=False`: the template writes its own BOS. Raises ValueError for a template that is not
    valid jinja2, that refuses the messages, or that does what the sandbox forbids.
    """
    render = load_chat_template_renderer()
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return render(conversations=[said], tools=tools, chat_template=chat_template,
                      add_generation_prompt=True, **tokenizer.special_tokens_map)[0][0]
    except Exception as error:               # a template can fail in every way that a program can
        raise ValueError("the model's chat template cannot render these messages: "
                         f"{error_in_one_line(error)}") from error


def load_chat_template_renderer() -> Callable:
    """transformers' function that renders chat templates. Raises ValueError without the hub extra."""
    import_transformers("chat templates")
    import_optional_package("jinja2", "chat templates")
    from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template
