"""Reading the text files of a folder; a file that cannot be read is left out with a reason.

UTF-8 is read, with or without a byte order mark; no other encoding is guessed. Symbolic links are followed. A
file is read once, whatever links lead to it, under its own name if that lies in the folder, else under the
first link's name; so it cannot be on both sides of the train and held-out split. Feeds corpus.py.
"""
import codecs
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class SkippedFile(NamedTuple):
    """A file, folder or link that is left out."""
    path: str                  # relative to the corpus, with /
    reason: str


def read_text_folder(root: Path, enter_folder: Callable[[str], bool], suffix: str = "",
                     follow_links: bool = True) -> tuple[list[tuple[str, str]], list[SkippedFile]]:
    """Return (relative path, text) of every text file below `root`, sorted, and what was left out.

    A folder is entered when `enter_folder(name)` is true, a link to a folder only with `follow_links` too; a
    hidden folder that is not entered counts as left out. Raises OSError when `root` itself cannot be read.
    """
    os.listdir(root)
    tree = _Tree(root, enter_folder, suffix, follow_links)
    tree.walk(root)
    tree.follow_links()
    documents = []
    for path in tree.files:
        try:
            documents.append((tree.name(path), read_text_file(path)))
        except OSError as error:
            tree.skip(path, error.strerror)
    return sorted(documents), tree.skipped


def read_text_file(path: Path) -> str:
    """Return the text of a file, without its byte order mark. Raises OSError when it is no UTF-8 text."""
    if path.exists() and not path.is_file():
        raise OSError(0, "not a regular file")       # a pipe would wait for a writer for ever
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        other = "UTF-16, " * data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise OSError(0, f"{other}not UTF-8 text") from error
    if "\0" in text:
        raise OSError(0, "binary, not text")
    return text


def summarize_skip_reasons(skipped: Iterable[SkippedFile]) -> str:
    """Summarize how many files are left out for each reason, most frequent first, with an example each."""
    skipped = list(skipped)
    first = {reason: path for path, reason in reversed(skipped)}
    counts = Counter(reason for _, reason in skipped).most_common()
    return "; ".join(f"{count} {reason} (e.g. {first[reason]!r})" for reason, count in counts)


class _Tree:
    """A walk below `root`: the `files` to read, the `links` still to follow, all identities `seen`."""

    def __init__(self, root, enter, suffix, follow):
        self.root, self.enter = root, enter
        self.suffix, self.follow = suffix, follow
        self.files, self.links = [], deque()
        self.skipped, self.seen = [], set()

    def walk(self, top, linked=False):
        """Take what lies below `top`; what a link has led to may have been seen before."""
        for folder, inner, names in os.walk(top, onerror=self._closed):
            self.seen.add(_identity(folder))
            inner[:] = [name for name in sorted(inner) if self._enters(Path(folder, name), linked)]
            for path in (Path(folder, name) for name in sorted(names) if name.endswith(self.suffix)):
                if self.follow and path.is_symlink():
                    self.links.append(path)
                else:
                    self._take(path, linked)

    def follow_links(self):
        """Last, so that what lies in the folder has its own name."""
        while self.links:
            link = self.links.popleft()
            if link.is_dir() and Path(os.path.realpath(link.parent)).is_relative_to(os.path.realpath(link)):
                self.skip(link, "a link to a folder above it")
            elif link.is_dir() and not self._is_seen(link):
                self.walk(link, linked=True)
            elif not link.is_dir():
                self._take(link, linked=True)

    def skip(self, path, reason):
        self.skipped.append(SkippedFile(self.name(path), reason))

    def name(self, path):
        return path.relative_to(self.root).as_posix()

    def _enters(self, path, linked):
        if not self.enter(path.name):
            if path.name.startswith("."):
                self.skip(path, "a hidden folder")
            return False
        if path.is_symlink():
            self.links += [path] * self.follow
            return False
        return not (linked and self._is_seen(path))

    def _take(self, path, linked):
        if not (linked and self._is_seen(path)):
            self.files.append(path)
            self.seen.add(_identity(path))

    def _is_seen(self, path):
        identity = _identity(path)
        seen = identity is not None and identity in self.seen
        if seen:
            self.skip(path, "a link to what is read already")
        return seen

    def _closed(self, error):
        self.skipped.append(SkippedFile(error.filename, error.strerror))


def _identity(path):
    """Device and inode of what a path leads to; None where that is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
