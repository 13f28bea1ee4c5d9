"""Known-wrong ways to data: damaged caches trusted, files dropped or read twice, long words learned whole."""
import contextlib
import io
import os
import tempfile
from pathlib import Path

from tokenizers import pre_tokenizers

from nanoinfra.data import read_text_files
from nanoinfra.data.read_text_files import read_text_folder
from nanoinfra.data.tokenizer_and_token_cache import CONTENT_FOLDER, get_or_build_folder
from nanoinfra.data.train_tokenizer import MAX_TRAINING_WORD_BYTES, BPETokenizer
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched

caches, folders, words = Check("cached folder"), Check("folder of texts"), Check("long words")


def reopened(damage):
    """(content, lines said) of an entry that is opened again after `damage(path of its file)`."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()) as said:
        path = get_or_build_folder("x", lambda folder: (folder / "a").write_bytes(b"whole"), root) / "a"
        damage(path)
        again = get_or_build_folder("x", lambda folder: (folder / "a").write_bytes(b"whole"), root)
        return (again / "a").read_bytes(), said.getvalue().count("\n")


def _restored(name, damage, lines=1):
    @caches.criterion(name, "property")
    def _(subject):
        if (got := subject(damage)) != (want := (b"whole", lines)):
            raise CriterionNotMet(f"the entry holds {got[0]} and {got[1]} lines were said; want {want}")
    return name


SOUND = _restored("what is sound is left", lambda path: None, lines=0)
SAME_SIZE = _restored("other bytes of the same size are seen", lambda path: path.write_bytes(b"wh\0\0e"))
BESIDE = _restored("a file beside them is seen", lambda path: (path.parent / "b").write_bytes(b""))
GONE = _restored("what is no entry is replaced", lambda path: os.rename(path, path.parents[1] / "a"))


def sizes(entry):
    """What is wrong with an entry, for one who looks at sizes alone."""
    return None if [f.stat().st_size for f
                    in (entry / CONTENT_FOLDER).iterdir()] == [5] else "has another size"


def listing(files, links):
    """({path: text}, {path: reason}) of a folder of `files` and `links`, both {path: content or target}."""
    with tempfile.TemporaryDirectory() as root:
        home = Path(root, "home")
        for path, text in files.items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_bytes(text)
        for path, target in links.items():
            (home / path).symlink_to(home / target)
        found, skipped = read_text_folder(home / "texts", lambda name: True)
        return dict(found), dict(skipped)


def _listed(name, files, links, texts, *skipped):
    @folders.criterion(name, "property")
    def _(subject):
        got, left = subject(files, links)
        if (sorted(got), sorted(left)) != (want := (sorted(texts), sorted(skipped))):
            raise CriterionNotMet(f"read {sorted(got)}, left out {left}; want {want}")
    return name


FILES = {"texts/a": b"a", "else/b": b"b"}
TOLD = _listed("what is no text is told", FILES | {"texts/c": b"\xe9"}, {}, "a", "c")
LINKED = _listed("links are followed", FILES, {"texts/far": "else"}, ["a", "far/b"])
ONCE = _listed("a file is read once", FILES,
               {"texts/far": "else", "texts/near": "else", "texts/z": "texts/a"}, ["a", "far/b"], "near", "z")
ABOVE = _listed("no link leads upwards", FILES, {"texts/up": "."}, "a", "up")


@words.criterion("a long word is learned from in parts", "property")
def _(subject):
    parts = ["ab" * (MAX_TRAINING_WORD_BYTES // 2)] * 8
    got, want = subject(["".join(parts)], 300), BPETokenizer.train(parts, 300)
    if got.backend_tokenizer.get_vocab() != want.backend_tokenizer.get_vocab():
        raise CriterionNotMet("one long word teaches something else than its parts")


@words.criterion("a long word is encoded in one piece", "property")
def _(subject):
    got = len(subject(["ab ab ab"], 300).encode("c" * (MAX_TRAINING_WORD_BYTES - 1) + "ab"))
    if got != MAX_TRAINING_WORD_BYTES:
        raise CriterionNotMet(f"{MAX_TRAINING_WORD_BYTES + 1} bytes with one merge are {got} tokens; "
                              f"want "
                              f"{MAX_TRAINING_WORD_BYTES}")


class Unread(read_text_files._Tree):
    """Links stay where they are."""

    def follow_links(self):
        pass


class Upwards(read_text_files._Tree):
    """Links lead anywhere that was not seen."""

    def follow_links(self):
        while self.links:
            if not self._is_seen(link := self.links.popleft()):
                self.walk(link, linked=True)


def cut_for_ever(texts, vocab):
    """Training's parts are those of encoding too."""
    made = BPETokenizer.train(texts, vocab)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [made.backend_tokenizer.pre_tokenizer, pre_tokenizers.FixedLength(MAX_TRAINING_WORD_BYTES)])
    return made


MUTANTS = [
    Mutant("nobody verifies", caches, patched(
        reopened, "nanoinfra.data.tokenizer_and_token_cache:_fault", lambda entry: None), SAME_SIZE),
    Mutant("sizes are enough", caches, patched(reopened, "nanoinfra.data.tokenizer_and_token_cache:_fault",
                                               sizes),
           SAME_SIZE),
    Mutant("what is left out is forgotten", folders,
           lambda files, links: (listing(files, links)[0], {}), TOLD),
    Mutant("links stay unread", folders, patched(
        listing, "nanoinfra.data.read_text_files:_Tree", Unread), LINKED),
    Mutant("a file has as many lives as names", folders, patched(
        listing, "nanoinfra.data.read_text_files:_identity", lambda path: None), ONCE),
    Mutant("links lead upwards", folders, patched(
        listing, "nanoinfra.data.read_text_files:_Tree", Upwards), ABOVE),
    Mutant("words are learned whole", words, patched(
        BPETokenizer.train, "nanoinfra.data.train_tokenizer:MAX_TRAINING_WORD_BYTES", 1 << 30),
           "a long word is learned from in parts"),
    Mutant("words are cut for ever", words, cut_for_ever, "a long word is encoded in one piece"),
]
