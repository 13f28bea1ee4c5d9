"""The text files of a Hugging Face folder: opened, copied to where they are kept, written for a GGUF model.

What they mean is what transformers' AutoTokenizer makes of them: a tokenizer of the `tokenizers` package,
special tokens by name, a chat template. So a run that starts from such a folder keeps exact copies,
config.json with them (AutoTokenizer looks there too), and its export has them again. A tokenizer that was
trained here (data/train_tokenizer.py) is read with `tokenizers` alone.
"""
import json
import shutil
from pathlib import Path

from nanoinfra.data.train_tokenizer import Tokenizer
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights import import_transformers
from nanoinfra.model.weights.json_files import check_content, read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model",
                "sentencepiece.bpe.model", "tiktoken.model", "tekken.json")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
          "chat_template.jinja", "generation_config.json")
TEMPLATES = "additional_chat_templates"                 # the folder of further ones
TEXT_FILES = (*VOCABULARIES, "tokenizer.*.json", *BESIDE, TEMPLATES)                # patterns
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")       # config.json has them, and our configuration not
KEPT = (*IDS, "tokenizer_class")
MOST_BYTES = 1 << 28                         # of a file; the largest vocabularies take 40 MB
MOST_DIGITS = 8                              # of an id: transformers counts up to it
METHODS = ("__call__", "encode", "_encode_plus", "decode", "_decode", "clean_up_tokenization")


def open_text(folder: str | Path) -> tuple[Text | None, str | None]:
    """Tokenizer and chat template of a folder; None where it has none. ValueError names what is wrong."""
    folder = Path(folder)
    if Tokenizer.is_own(folder):
        own = Tokenizer.load(folder)
        return Text(own.backend, frozenset({own.eot}), own.end_of_text, own.end_of_text), None
    if not any((folder / name).is_file() for name in VOCABULARIES):
        if (folder / "tokenizer_config.json").exists():
            raise ValueError(f"{folder} holds a tokenizer_config.json, but no tokenizer.json "
                             "or other vocabulary; fetch what is missing, or remove it, to use weights alone")
        return None, None
    library = import_transformers.transformers("the tokenizers of Hugging Face folders")
    _check_files(folder)
    if not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model")):
        for package in ("sentencepiece", "google.protobuf"):             # else transformers asks for tiktoken
            import_transformers.optional(package, f"{folder}: tokenizers that are not tokenizer.json")
    try:
        theirs = import_transformers.asked(str(folder), library.AutoTokenizer.from_pretrained, str(folder),
                           local_files_only=True, trust_remote_code=False)
    except ValueError:
        for path in folder.glob("*.json"):   # names the one that is no JSON
            read_json(path)
        raise
    _check_kind(theirs, library.PreTrainedTokenizerFast, folder)
    return _text(theirs, folder), _template(theirs, folder)


def copy_text(source: str | Path, folder: str | Path, config: bool = False) -> None:
    """Make the text files of `folder` those of `source`, with `config` config.json too; no others stay."""
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        return
    clear_text(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    for path in _files(source, config):
        shutil.copyfile(path, folder / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)


def clear_text(folder: str | Path, config: bool = False) -> None:
    """Remove the text files of a folder, and with `config` config.json: what is written next is all of it."""
    for path in _files(Path(folder), config):
        path.unlink()
    shutil.rmtree(Path(folder, TEMPLATES), ignore_errors=True)


def write_text(text: Text, template: str | None, folder: str | Path) -> None:
    """Write `text`, which came from no folder, as one that transformers reads to the same."""
    folder = Path(folder)
    clear_text(folder, config=True)
    folder.mkdir(parents=True, exist_ok=True)
    text.backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": text.clean_up}
    _write(folder / "tokenizer_config.json", config | text.special_tokens)
    ids = {f"{name}_id": text.backend.token_to_id(token) for name, token in text.special_tokens.items()}
    ids = {name: ids.get(name) for name in IDS} | {"eos_token_id": sorted(text.ends) or None}
    known = {name: found for name, found in ids.items() if found is not None}
    _write(folder / "generation_config.json", known)
    _write(folder / "config.json", ids)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def kept_ids(folder: str | Path | None) -> dict:
    """What a model's config.json says of the tokenizer that `folder` keeps for it."""
    if folder is None:
        return dict.fromkeys(IDS)
    if Tokenizer.is_own(folder):
        eot = Tokenizer.load(folder).eot
        return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    theirs = read_json(Path(folder, "config.json"))
    return {name: theirs[name] for name in KEPT if name in theirs}


def _text(theirs, folder):
    backend = theirs.backend_tokenizer
    backend.no_truncation()                  # tokenizer.json may ask for both, for batches of a training
    backend.no_padding()
    ends = {theirs.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        ends |= _ids(read_json(folder / name).get("eos_token_id"), folder / name)
    bpe = type(backend.model).__name__ == "BPE"
    corrupt = theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return Text(backend, frozenset(ends), theirs.bos_token or "", theirs.eos_token or "",
                theirs.special_tokens_map, bool(theirs.clean_up_tokenization_spaces and (corrupt or not bpe)),
                backend.encode_special_tokens)


def _ids(given, path):
    """The ids of an eos_token_id: one, several, or none."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id is {given!r:.80}; it must be the number of a token, or "
                         "a list of such")
    return set(ids)


def _template(theirs, folder):
    given = theirs.chat_template
    given = given.get("default") if isinstance(given, dict) else given               # several, by name
    if not isinstance(given, str | None):
        raise ValueError(f"{folder}: the chat template is a {type(given).__name__}; it must be text")
    return given


def _files(folder, config=False):
    """Those that are there, of all that AutoTokenizer reads."""
    names = (*VOCABULARIES, *BESIDE, *["config.json"] * config)
    paths = {*map(folder.joinpath, names), *folder.glob("tokenizer.*.json")}
    return [path for path in paths if path.is_file()]


def _check_files(folder):
    for path in _files(folder):
        check_content(path)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{path} has {size} bytes; a tokenizer's file has at most {MOST_BYTES}")
    added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(added, dict) and any(len(i) > MOST_DIGITS for i in added):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder has ids of more than "
                         f"{MOST_DIGITS} digits")


def _check_kind(theirs, base, folder):
    """Refuse what is more than a backend: another way to cut, to join or to clean text."""
    kind = type(theirs)
    other = [name for name in METHODS if getattr(kind, name) is not getattr(base, name, None)]
    if other or not getattr(theirs, "is_fast", False):
        raise ValueError(f"{folder}: its tokenizer, transformers' {kind.__name__}, is not one of the "
                         "tokenizers package alone; save it as a PreTrainedTokenizerFast")


def _write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
