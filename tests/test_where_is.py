"""WHERE_IS.md finds techniques by the field's words: each word stands in the file that it points to."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| ([^|]+) \| \[[^]]+\]\(([^)]+)\) \| (?:\[\d+\]\(([^)]+)\))? *\|$",
                  (ROOT / "WHERE_IS.md").read_text(), re.M)
LOOKED_UP = {"gradient accumulation", "loss scaling", "RoPE", "preemption", "checkpoint resharding",
             "learning-rate schedule", "mixed precision", "request cancellation"}
GREPPED = ("activation checkpointing", "gradient accumulation", "hidden states", "reshard", "chunked prefill",
           "detokeni", "slot_mapping", "ref_count", "block_table")


def words_of(path):
    """The text of a file on one line, without the marks and breaks that prose has between its words."""
    return re.sub(r"[\s#*`\"-]+", " ", (ROOT / path).read_text()).lower()


def test_there_are_enough_rows():
    assert len(ROWS) >= 30 and LOOKED_UP <= {what for what, _, _ in ROWS}


@pytest.mark.parametrize("what, file, lesson", ROWS, ids=[row[0] for row in ROWS])
def test_each_word_stands_in_its_file(what, file, lesson):
    text = words_of(file)
    for word in what.split(", "):
        assert re.sub(r"[\s-]+", " ", word).lower() in text, f"{file} never says {word!r}"
    assert not lesson or (ROOT / lesson / "lesson.py").is_file()


@pytest.mark.parametrize("word", GREPPED)
def test_the_fields_words_are_found_in_the_library(word):
    files = [path for path in (ROOT / "nanoinfra").rglob("*.py") if word in path.read_text().lower()]
    assert files
