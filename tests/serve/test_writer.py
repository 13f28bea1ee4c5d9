"""Text as it may be shown: whole characters, never a part of a stop string."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoinfra.data.tokenizer import Tokenizer
from nanoinfra.serve.writer import Stream, Writer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["one two three"] * 9, vocab=262)     # foreign characters are single bytes


def test_no_part_of_a_character_is_ever_shown(tokenizer):
    string = "one \u65e5\u672c \U0001f642\U0001f642 \ufffd two\ufffd\ufffd caf\xe9\ufffd"
    ids, shown, whole = tokenizer.encode(string), Stream(tokenizer.decode), ""
    assert len(ids) > len(string)
    for token in ids:
        whole += shown.push(token)
        assert string.startswith(whole)
    assert whole + shown.finish() == string


def test_a_text_that_ends_within_a_character_says_so(tokenizer):
    ids, shown = tokenizer.encode("a\U0001f642")[:-1], Stream(tokenizer.decode)
    assert "".join(map(shown.push, ids)) == "a" and shown.finish() == "\ufffd"


def test_decoding_a_stream_does_not_look_back_further_than_a_word(tokenizer):
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return tokenizer.decode(ids)
    shown = Stream(decode)
    for token in tokenizer.encode("one two three " * 50):
        shown.push(token)
    assert max(asked) <= 2


@given(st.lists(st.integers(0, 255) | st.sampled_from([0x9f, 0xf0, 0xe6]), max_size=60),
       st.integers(0, 40), st.integers(0, 255))
def test_bytes_that_are_no_characters_are_shown_and_cost_no_more_the_longer_it_goes_on(ids, times, byte):
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return bytes(ids).decode(errors="replace")
    shown, ids = Stream(decode), [*ids, *[byte] * times, *"\u65e5\U0001f642".encode()]
    assert "".join(map(shown.push, ids)) + shown.finish() == decode(ids)
    assert max(asked[:-1], default=0) <= 28


def test_tokens_without_a_text_after_a_part_of_a_character_do_not_pile_up():
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return bytes(each for each in ids if each < 256).decode(errors="replace")
    shown = Stream(decode)
    ids = [*b"ab", 0xf0, *[300] * 100, *"c\U0001f642".encode()]
    assert "".join(map(shown.push, ids)) + shown.finish() == "ab\ufffdc\U0001f642" and max(asked) <= 40


def test_a_stop_string_costs_as_much_as_what_comes_and_not_as_it_is_long():
    """Counted in comparisons: 500 letters, all of which might begin one of 64 stop strings."""
    class Counted(str):
        def __getitem__(self, at):
            compared.append(at)
            return super().__getitem__(at)
    compared, stops = [], [Counted("a" * (400 + i) + "b") for i in range(64)]
    writer = Writer(letters, tuple(stops))
    for _ in range(500):
        writer.push(ord("a"))
    assert not writer.stopped and len(writer.held) == 463 and len(compared) < 5 * 64 * 500
    assert writer.push(ord("b")) == "" and writer.stopped


def letters(ids):
    return "".join(map(chr, ids))


def write(text, stop):
    """(all that was shown, the pieces, was it stopped) of a text whose tokens are letters."""
    writer, pieces = Writer(letters, tuple(stop)), []
    for letter in text:
        pieces.append(writer.push(ord(letter)))
        if writer.stopped:
            break
    pieces.append(writer.finish())
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
