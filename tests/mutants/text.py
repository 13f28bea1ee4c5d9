"""Known-wrong texts: a Hugging Face folder's tokenizer read, kept or shown as transformers does not."""
import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import tokenizers
import transformers
from tokenizers import decoders, models

from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.hugging_face import tokenizer_files
from nanoinfra.model.weights.hugging_face.tokenizer_files import (
    copy_tokenizer_files,
    open_hf_tokenizer,
    tokenizer_keys_for_config,
)
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights
from nanoinfra.serve.engine import detokenizer
from nanoinfra.train import open_model_and_data
from nanoinfra.train.load_and_export_models import save_pretrained_tokenizer
from tests.model.tokenizer_kinds import save
from tests.serve.letters import byte_text

shown, folders, kept = Check("text shown"), Check("text of a folder"), Check("text kept")
trained = Check("text trained on")


def show(text, ids):
    """(what a stream shows of `ids`, the most that it holds)."""
    stream, said, most = detokenizer.IncrementalDetokenizer(text), "", 0
    for token in ids:
        said += stream.push_token(token)
        most = max(most, len(stream.held))
    return said + stream.flush(), most


def words(decoder, *tokens, **more):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    backend.decoder = decoder
    return Tokenizer(backend, **more)


def reaching_back():
    return words(decoders.Sequence([decoders.Fuse(), decoders.Replace("bc", "X")]), "a", "b", "c")


def spaced():
    return words(decoders.Fuse(), "a ", "'", " b", ".", clean_up_tokenization_spaces=True)


def pieces():
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return words(decoder, "a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>")


def _shows(name, make, *lists):
    @shown.criterion(name, "property")
    def _(subject):
        text = make()                        # anew: it remembers what it has found out of itself
        for ids in lists:
            if (got := subject(text, ids)[0]) != (want := text.decode(ids)):
                raise CriterionNotMet(f"{ids} are shown as {got!r}, the whole is {want!r}")
    return name


RUN = _shows("a run of bytes is shown when it has ended", pieces, [0, 1, 2, 3, 0], [1, 2, 3, 4, 0], [0, 1, 2])
FAR = _shows("a decoder that changes what lies far back gives all at the end",
             reaching_back, [0, 1, 2, 0])
CLEANED = _shows("spaces are cleaned across tokens", spaced, [0, 1, 2, 3], [0, 3], [0, 1, 1, 2])
ACROSS = _shows("a character may lie across each cut",
                lambda: byte_text(several=[b"\xac\xe2\x82", b"\xa5\xe6"]),
                [0xe2, 0x82, *[256] * 50, 0xac], [257] * 50, [0xf0, *b"\x9f\x98\x80" * 30])


@shown.criterion("ids without text are not kept", "resource")
def _(subject):
    if (most := subject(byte_text(["<end>"]), [0xf0, *[256] * 50, *[900] * 50])[1]) > 4:
        raise CriterionNotMet(f"{most} tokens are held, of which one has a text")


def read(kind, **files):
    """A folder of `kind` with JSON `files` written over: what open_hf_tokenizer says, or the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        save(kind, Path(folder))
        for name, content in files.items():
            path = Path(folder, f"{name}.json")
            before = json.loads(path.read_text()) if path.exists() and isinstance(content, dict) else {}
            path.write_text(json.dumps(before | content) if isinstance(content, dict) else content)
        try:
            return open_hf_tokenizer(folder)[0]
        except ValueError as error:
            return str(error)


@folders.criterion("what tokenizer.json asks for in a training does not cut a prompt", "property")
def _(subject):
    text = subject("truncation and padding")
    long, short = len(text.encode("0123456789" * 3)), len(text.encode("a"))
    if long != 31 or short != 2:
        raise CriterionNotMet(f"prompts of 30 digits and of a letter have {long} and {short} tokens: cut, or "
                              "padded")


@folders.criterion("an eos named anywhere ends an answer", "property")
def _(subject):
    text = subject("gpt2", generation_config={"eos_token_id": [3, 4]}, config={"eos_token_id": 2})
    if (got := text.eos_token_ids) != {1, 2, 3, 4}:
        raise CriterionNotMet(f"{got} end an answer, want 1 to 4")


@folders.criterion("special tokens are found by name", "property")
def _(subject):
    if (got := subject("llama2").special_tokens_map.get("pad_token")) != "<pad>":
        raise CriterionNotMet(f"the pad token is {got!r}, want <pad>")


def _refuses(name, says, kind="gpt2", **files):
    @folders.criterion(name, "property")
    def _(subject):
        got = subject(kind, **files)
        if not isinstance(got, str) or says not in got:
            raise CriterionNotMet(f"want a refusal with {says!r}, got {got}")
    return name


LFS = _refuses("a Git LFS pointer is named", "Git LFS pointer",
               tokenizer="version https://git-lfs.github.com\n")
OTHER = _refuses("a tokenizer that is more than its backend is refused", "is not one of",
                 tokenizer_config={"tokenizer_class": "CodeGenTokenizer"})
IDS = _refuses("an eos that is no number is refused", "number of a token",
               generation_config={"eos_token_id": "2"})
HUGE = _refuses("added tokens with ids without end are refused", "digits",
                tokenizer_config={"added_tokens_decoder": {"1" * 12: {"content": "x"}}})


def keep():
    """What transformers makes of a model's folder, and of an export into a folder where an older one was."""
    with tempfile.TemporaryDirectory() as folder:
        source, run, out = (Path(folder, name) for name in ("source", "run", "out"))
        save("llama2 class", source, eos_token_id=[1, 4], pad_token_id=3, tokenizer_class="LlamaTokenizer")
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool.jinja").write_text("t")
        (source / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
        save("llama2 class", out)
        (out / "chat_template.jinja").write_text("old")
        save_pretrained_tokenizer(PretrainedWeights(None, None, *open_hf_tokenizer(source), source), run)
        copy_tokenizer_files(run, out)
        (out / "config.json").write_text(json.dumps({"model_type": "llama",
                                                     **tokenizer_keys_for_config(run)}))
        return [_described(each) for each in (source, out)]


def _described(folder):
    found = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    return {"templates": found.chat_template, "ids": (config.eos_token_id, config.pad_token_id),
            "generation": tokenizer_files.read_json(Path(folder, "generation_config.json"))}


def _keeps(what, name):
    @kept.criterion(name, "property")
    def _(subject):
        want, got = subject()
        if got[what] != want[what]:
            raise CriterionNotMet(f"{what}: want {want[what]}, got {got[what]}")
    return name


TEMPLATES = _keeps("templates", "all chat templates, and no older ones")
CONFIG = _keeps("ids", "the ids in config.json")
GENERATION = _keeps("generation", "generation_config.json")


def train(vocab, text):
    """The tokenizer that a model of `vocab` tokens is trained with, or why it is not with that of `text`."""
    try:
        return open_model_and_data._tokenizer(mock.Mock(), PretrainedWeights(mock.Mock(vocab=vocab), None,
                                                                               text))
    except ValueError as error:
        return str(error)


@trained.criterion("text needs the model's own tokenizer", "property")
def _(subject):
    if "no tokenizer" not in str(got := subject(300, None)):
        raise CriterionNotMet(f"a model without a tokenizer is trained with {got}")


@trained.criterion("the model knows every id of it", "property")
def _(subject):
    text = replace(byte_text([f"<{i}>" for i in range(44)]), eos_token="<0>")
    if "below 299 alone" not in str(got := subject(299, text)):
        raise CriterionNotMet(f"a model of 299 tokens is trained with 300: {got}")
    if isinstance(got := subject(300, text), str) or got.eot_token_id != 256:
        raise CriterionNotMet(f"a model of 300 tokens is not trained with 300: {got}")


def patching(subject, owner, name, value):
    """`subject` while `owner` has `value` for `name`."""
    @functools.wraps(subject)
    def variant(*args, **kwargs):
        with mock.patch.object(owner, name, value):
            return subject(*args, **kwargs)
    return variant


class HoldsNoSpace(detokenizer.StreamingReplacer):
    def push_text(self, piece):
        return super().push_text(piece) + super().flush()


class SkipsNothing(detokenizer.IncrementalDetokenizer):
    def _cut(self):
        said = super()._cut()
        self.skip = 0
        return said


def cuts_prompts(theirs, folder, right=tokenizer_files._text):
    before = theirs.backend_tokenizer.truncation, theirs.backend_tokenizer.padding
    text = right(theirs, folder)
    if before[0]:
        text.backend_tokenizer.enable_truncation(before[0]["max_length"])
        text.backend_tokenizer.enable_padding(length=before[1]["length"])
    return text


def knows_bos_and_eos(theirs, folder, right=tokenizer_files._text):
    text = right(theirs, folder)
    return Tokenizer(text.backend_tokenizer, text.eos_token_ids, text.bos_token, text.eos_token)


def one_name(theirs, folder, right=tokenizer_files._text):
    text = right(theirs, folder)
    return Tokenizer(text.backend_tokenizer, frozenset({theirs.eos_token_id}), text.bos_token,
                     text.eos_token, text.other_special_tokens)


def any_number(given, path):
    return set(given) if isinstance(given, list) else {given} - {None}


def larger_one(flags, weights, right=open_model_and_data._tokenizer):
    if weights.tokenizer is None:
        return right(flags, weights)
    return BPETokenizer(weights.tokenizer.backend_tokenizer, "<0>")


def none(flags, weights, right=open_model_and_data._tokenizer):
    return weights.tokenizer and right(flags, weights)


NEEDED, KNOWN = (c.name for c in trained.criteria)
SHORT = shown.criteria[-1].name
CUT, ENDS, NAMED = (c.name for c in folders.criteria[:3])
HF = "nanoinfra.model.weights.hugging_face.tokenizer_files"
MUTANTS = [
    Mutant("bytes are shown one by one", shown, patching(show, Tokenizer, "has_byte_fallback", False), RUN),
    Mutant("every decoder is taken for local", shown,
           patching(show, Tokenizer, "is_incrementally_decodable", True), FAR),
    Mutant("a piece is cleaned alone", shown,
           patched(show, "nanoinfra.serve.engine.detokenizer:StreamingReplacer", HoldsNoSpace), CLEANED),
    Mutant("the last character of a cut comes twice", shown,
           patched(show, "nanoinfra.serve.engine.detokenizer:IncrementalDetokenizer", SkipsNothing), ACROSS),
    Mutant("special ids are decoded again and again", shown,
           patching(show, Tokenizer, "special_token_ids", ()), SHORT),
    Mutant("truncation is left", folders, patched(read, f"{HF}:_text", cuts_prompts), CUT),
    Mutant("the tokenizer's eos alone", folders, patched(read, f"{HF}:_text", one_name), ENDS),
    Mutant("bos and eos alone have names", folders, patched(read, f"{HF}:_text", knows_bos_and_eos), NAMED),
    Mutant("files are not looked at", folders,
           patched(read, f"{HF}:_check_files", lambda folder: None), HUGE),
    Mutant("a pointer is taken for the file", folders,
           patched(read, "nanoinfra.model.weights.read_json_files:GIT_LFS_POINTER_START", b"\0"), LFS),
    Mutant("classes are not looked at", folders,
           patched(read, f"{HF}:UNCHANGED_TOKENIZER_METHODS", ()), OTHER),
    Mutant("any eos", folders, patched(read, f"{HF}:_ids", any_number), IDS),
    Mutant("any number of tokens", folders, patched(read, f"{HF}:MAX_TOKEN_ID_DIGITS", 99), HUGE),
    Mutant("old templates stay", kept,
           patched(keep, f"{HF}:remove_tokenizer_files", lambda *given: None), TEMPLATES),
    Mutant("further templates are lost", kept,
           patched(keep, f"{HF}:CHAT_TEMPLATES_FOLDER", "none"), TEMPLATES),
    Mutant("bos, eos and pad are lost", kept, patched(
        keep, "nanoinfra.model.weights.hugging_face.tokenizer_files:TOKENIZER_KEYS_IN_CONFIG", ()), CONFIG),
    Mutant("generation_config.json is lost", kept,
           patched(keep, f"{HF}:TOKENIZER_SIDE_FILES", tokenizer_files.TOKENIZER_SIDE_FILES[:-1]),
           GENERATION),
    Mutant("no tokenizer", trained, patched(train, "nanoinfra.train.open_model_and_data:_tokenizer", none),
           NEEDED),
    Mutant("a larger one", trained, patched(train, "nanoinfra.train.open_model_and_data:_tokenizer",
                                            larger_one),
           KNOWN),
]
