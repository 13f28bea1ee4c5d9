"""Text as it may be shown: whole characters, never a part of a stop string."""
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.tokenizer import CLEAN_UP_REPLACEMENTS, Tokenizer
from nanoinfra.model.weights.hugging_face.tokenizer_files import open_hf_tokenizer
from nanoinfra.serve.engine.detokenizer import (
    MAX_TOKENS_PER_CHARACTER,
    IncrementalDetokenizer,
    StopStringDetokenizer,
    StreamingReplacer,
)
from tests.model.tokenizer_kinds import BYTES as HEX
from tests.model.tokenizer_kinds import KINDS, STRINGS, save
from tests.serve.letters import byte_text, letters

BYTES, LETTERS = byte_text(["<end>"]), letters(first=0, n=128)


@pytest.fixture(scope="module")
def text():
    # others are single bytes
    return Tokenizer(BPETokenizer.train(["one two three"] * 9, vocab_size=262).backend_tokenizer)


def test_no_part_of_a_character_is_ever_shown(text):
    string = "one \u65e5\u672c \U0001f642\U0001f642 \ufffd two\ufffd\ufffd caf\xe9\ufffd"
    ids, shown, whole = text.encode(string), IncrementalDetokenizer(text), ""
    assert len(ids) > len(string)
    for token in ids:
        whole += shown.push_token(token)
        assert string.startswith(whole)
    assert whole + shown.flush() == string


def test_a_text_that_ends_within_a_character_says_so(text):
    ids, shown = text.encode("a\U0001f642")[:-1], IncrementalDetokenizer(text)
    assert "".join(map(shown.push_token, ids)) == "a" and shown.flush() == "\ufffd"


def test_a_stream_holds_no_more_than_a_word(text):
    shown = IncrementalDetokenizer(text)
    for token in text.encode("one two three " * 50):
        assert shown.push_token(token) and len(shown.context) <= 2 and not shown.held


@given(st.lists(st.integers(0, 255) | st.sampled_from([0x9f, 0xf0, 0xe6]), max_size=60),
       st.integers(0, 40), st.integers(0, 255))
def test_bytes_that_are_no_characters_are_shown_and_cost_no_more_the_longer_it_goes_on(ids, times, byte):
    shown, said = IncrementalDetokenizer(BYTES), ""
    ids = [*ids, *[byte] * times, *"\u65e5\U0001f642".encode()]
    for token in ids:
        said += shown.push_token(token)
        assert len(shown.held) < 4 * MAX_TOKENS_PER_CHARACTER
    assert said + shown.flush() == bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("odd", [256, 999])
def test_ids_without_a_text_after_a_part_of_a_character_do_not_pile_up(odd):
    """A special token; one that the model knows and the tokenizer does not."""
    shown, said = IncrementalDetokenizer(byte_text(["<end>"])), ""
    for token in [*b"ab", 0xf0, *[odd] * 100, *"c\U0001f642".encode()]:
        said += shown.push_token(token)
        assert len(shown.held) <= MAX_TOKENS_PER_CHARACTER
    assert said + shown.flush() == "ab\ufffdc\U0001f642"


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shown_is_the_text_of_the_whole(name, tmp_path):
    assert_streams_exactly(name, tmp_path, 30)


@pytest.mark.prove
@pytest.mark.parametrize("name", KINDS)
def test_what_is_shown_is_the_text_of_the_whole_always(name, tmp_path):
    assert_streams_exactly(name, tmp_path, 20000)


def assert_streams_exactly(name, folder, times):
    """Ids of strings, cut anywhere; any ids; a few again and again; and with all of them no more is held."""
    text, draws = open_hf_tokenizer(save(name, folder))[0], random.Random(name)
    bytes = [i for token, i in text.backend_tokenizer.get_vocab().items() if len(token) == 1 or token in HEX]
    ids = [text.encode(string) for string in STRINGS]
    ids += [one[:draws.randrange(len(one))] for one in ids if one]
    every = range(text.backend_tokenizer.get_vocab_size() + 9)
    for _ in range(times):
        some = draws.choice([bytes or every, every, draws.choices(bytes or every, k=3)])
        ids.append(draws.choices(some, k=draws.choice([3, 10, 80])))
    for one in ids:
        shown = IncrementalDetokenizer(text)
        got = "".join(map(shown.push_token, one)) + shown.flush()
        assert got == text.decode(one), one
        assert len(shown.held) < 4 * MAX_TOKENS_PER_CHARACTER


PARTS = {"space": decoders.Replace("\u2581", " "), "none": decoders.Replace("a", ""),
         "more": decoders.Replace("a", "xyz"), "bytes": decoders.ByteFallback(), "fuse": decoders.Fuse(),
         "strip": decoders.Strip(" ", 1, 0),
         "strip a": decoders.Strip("a", 2, 0), "level": decoders.ByteLevel(),
         "words": decoders.WordPiece(),
         "metaspace": decoders.Metaspace(), "never": decoders.Metaspace(prepend_scheme="never"),
         "ends": decoders.BPEDecoder("</w>"), "ctc": decoders.CTC()}
TOKENS = ["a", "b", " ", "  ", "\u2581", "\u2581a", "<0xE2>", "<0x82>", "<0xAC>", "<0x20>", "##a", "a</w>",
          "</w>", "\ufffd", "\xe9", "\u0120a", "\xe2", "\u0124", "\xac", "\xf0\u0141", "<pad>",
          "|", ".", "'", "n't",
          "", "</s>", "e\u0301"]


@pytest.mark.parametrize("times", [300, pytest.param(30_000, marks=pytest.mark.prove)])
def test_any_decoder_shows_the_text_of_the_whole(times):
    draws, local = random.Random(times), 0
    for _ in range(times):
        parts = draws.choices([*PARTS], k=draws.randrange(5))
        parts = draws.choice([parts, ["space", "bytes", "fuse", "strip"]])
        backend = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="a"))
        backend.add_special_tokens(["</s>"])
        backend.decoder = decoders.Sequence([PARTS[part] for part in parts]) if parts else None
        text = Tokenizer(backend, clean_up_tokenization_spaces=draws.random() < 0.2)
        for k in (2, 5, 12, 40):
            some = draws.choices(range(len(TOKENS)), k=2)
            some = draws.choice([range(len(TOKENS) + 1), some, [0, 6, 7, 8]])
            ids, shown = draws.choices(some, k=k), IncrementalDetokenizer(text)
            got = "".join(map(shown.push_token, ids)) + shown.flush()
            assert got == text.decode(ids), (parts, [TOKENS[i:i + 1] for i in ids])
        local += text.is_incrementally_decodable
    assert 0.3 < local / times < 0.95


@given(st.text("a '.n", max_size=20), st.lists(st.integers(0, 20), max_size=4))
def test_a_replacer_is_str_replace_in_pieces(text, cuts):
    ends = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for old, new in CLEAN_UP_REPLACEMENTS.items():
        replacer = StreamingReplacer(old, new)
        got = [replacer.push_text(text[a:b]) for a, b in zip(ends, ends[1:])]
        assert "".join(got) + replacer.flush() == text.replace(old, new)


def test_a_stop_string_costs_as_much_as_what_comes_and_not_as_it_is_long():
    """Counted in comparisons: 500 letters, all of which might begin one of 64 stop strings."""
    class Counted(str):
        def __getitem__(self, at):
            compared.append(at)
            return super().__getitem__(at)
    compared, stops = [], [Counted("a" * (400 + i) + "b") for i in range(64)]
    writer = StopStringDetokenizer(LETTERS, tuple(stops))
    for _ in range(500):
        writer.push_token(ord("a"))
    assert not writer.stopped and len(writer.held) == 463 and len(compared) < 5 * 64 * 500
    assert writer.push_token(ord("b")) == "" and writer.stopped


def write(text, stop):
    """(all that was shown, the pieces, was it stopped) of a text whose tokens are letters."""
    writer, pieces = StopStringDetokenizer(LETTERS, tuple(stop)), []
    for letter in text:
        pieces.append(writer.push_token(ord(letter)))
        if writer.stopped:
            break
    pieces.append(writer.flush())
    return "".join(pieces), pieces, writer.stopped


@pytest.mark.parametrize("text, stop, shown, stopped", [
    ("one END two", ["END"], "one ", True), ("one EN", ["END"], "one EN", False), ("aab", ["ab"], "a", True),
    ("x</s>", ["</s>", "<"], "x", True), ("stop", ["stop"], "", True), ("one two", [], "one two", False)])
def test_a_stop_string_ends_the_text_and_is_not_shown(text, stop, shown, stopped):
    got, _, ended = write(text, stop)
    assert (got, ended) == (shown, stopped)


def test_what_may_become_a_stop_string_is_held_and_given_when_it_does_not():
    assert write("aENDINo", ["ENDING"])[1] == ["a", "", "", "", "", "", "ENDINo", ""]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_it_is_always_the_text_before_the_stop_that_is_whole_first(text, stop):
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(each) for each in stop)]
    want = text if not ends else min((text[:ends[0] - len(each)] for each in stop
                                      if text[:ends[0]].endswith(each)), key=len)
    got, pieces, stopped = write(text, stop)
    assert (got, stopped) == (want, bool(ends))
