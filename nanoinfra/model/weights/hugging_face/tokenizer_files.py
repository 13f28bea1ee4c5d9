"""The tokenizer files of a Hugging Face folder: open, copy, remove and write them.

transformers' AutoTokenizer interprets them: a tokenizer of the `tokenizers` package, special tokens by name,
a chat template. So a run that starts from such a folder keeps exact copies, with config.json (AutoTokenizer
reads it too), and its export has them again. A tokenizer that nanoinfra trained (data/train_tokenizer.py)
needs only the `tokenizers` package.
"""
import json
import shutil
from pathlib import Path

from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.call_transformers import (
    call_transformers,
    import_optional_package,
    import_transformers,
)
from nanoinfra.model.weights.read_json_files import check_file_is_fetched, read_json

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                     "spm.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json")
TOKENIZER_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
                        "chat_template.jinja", "generation_config.json")
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
TOKENIZER_FILE_PATTERNS = (*_VOCABULARY_FILES, "tokenizer.*.json", *TOKENIZER_SIDE_FILES,
                           CHAT_TEMPLATES_FOLDER)
SPECIAL_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")     # of config.json
TOKENIZER_KEYS_IN_CONFIG = (*SPECIAL_TOKEN_ID_KEYS, "tokenizer_class")
MAX_TOKENIZER_FILE_BYTES = 1 << 28           # the largest vocabularies take 40 MB
MAX_TOKEN_ID_DIGITS = 8                      # transformers counts up to the largest id
UNCHANGED_TOKENIZER_METHODS = ("__call__", "encode", "_encode_plus", "decode", "_decode",
                               "clean_up_tokenization")


def open_hf_tokenizer(folder: str | Path) -> tuple[Tokenizer | None, str | None]:
    """Open (tokenizer, chat template) of a folder; each is None where it has none.

    Raises ValueError naming the file that is wrong or missing.
    """
    folder = Path(folder)
    if BPETokenizer.is_saved_here(folder):
        own = BPETokenizer.load(folder)
        return Tokenizer(own.backend_tokenizer, frozenset({own.eot_token_id}), own.eot_token,
                         own.eot_token), None
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        if (folder / "tokenizer_config.json").exists():
            raise ValueError(f"{folder} holds a tokenizer_config.json, but no tokenizer.json "
                             "or other vocabulary; fetch what is missing, or remove it, to use weights alone")
        return None, None
    library = import_transformers("the tokenizers of Hugging Face folders")
    _check_files(folder)
    if not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model")):
        for package in ("sentencepiece", "google.protobuf"):  # without them transformers demands tiktoken
            import_optional_package(package, f"{folder}: tokenizers that are not tokenizer.json")
    try:
        theirs = call_transformers(str(folder), library.AutoTokenizer.from_pretrained, str(folder),
                                   local_files_only=True, trust_remote_code=False)
    except ValueError:
        for path in folder.glob("*.json"):   # raises ValueError for the file that is not valid JSON
            read_json(path)
        raise
    _check_kind(theirs, library.PreTrainedTokenizerFast, folder)
    return _text(theirs, folder), _template(theirs, folder)


def copy_tokenizer_files(source: str | Path, folder: str | Path,
                         include_config: bool = False) -> None:
    """Replace the tokenizer files of `folder` by those of `source`; `include_config`: config.json too."""
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        return
    remove_tokenizer_files(folder, include_config)
    folder.mkdir(parents=True, exist_ok=True)
    for path in _files(source, include_config):
        shutil.copyfile(path, folder / path.name)
    if (source / CHAT_TEMPLATES_FOLDER).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES_FOLDER, folder / CHAT_TEMPLATES_FOLDER)


def remove_tokenizer_files(folder: str | Path, include_config: bool = False) -> None:
    """Remove all tokenizer files of a folder; with `include_config`, config.json too."""
    for path in _files(Path(folder), include_config):
        path.unlink()
    shutil.rmtree(Path(folder, CHAT_TEMPLATES_FOLDER), ignore_errors=True)


def write_tokenizer_files(tokenizer: Tokenizer, chat_template: str | None, folder: str | Path) -> None:
    """Write the tokenizer of a GGUF file as a Hugging Face folder that transformers reads to the same one."""
    folder = Path(folder)
    remove_tokenizer_files(folder, include_config=True)
    folder.mkdir(parents=True, exist_ok=True)
    backend, special_tokens = tokenizer.backend_tokenizer, tokenizer.special_tokens_map
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast",
              "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces}
    _write(folder / "tokenizer_config.json", config | special_tokens)
    ids = {f"{name}_id": backend.token_to_id(token) for name, token in special_tokens.items()}
    ids = {name: ids.get(name) for name in SPECIAL_TOKEN_ID_KEYS}
    ids |= {"eos_token_id": sorted(tokenizer.eos_token_ids) or None}
    known = {name: found for name, found in ids.items() if found is not None}
    _write(folder / "generation_config.json", known)
    _write(folder / "config.json", ids)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def tokenizer_keys_for_config(folder: str | Path | None) -> dict:
    """The entries of a model's config.json that come from its tokenizer's folder: special token ids."""
    if folder is None:
        return dict.fromkeys(SPECIAL_TOKEN_ID_KEYS)
    if BPETokenizer.is_saved_here(folder):
        eot = BPETokenizer.load(folder).eot_token_id
        return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    theirs = read_json(Path(folder, "config.json"))
    return {name: theirs[name] for name in TOKENIZER_KEYS_IN_CONFIG if name in theirs}


def _text(theirs, folder):
    backend = theirs.backend_tokenizer
    backend.no_truncation()                  # tokenizer.json can ask for both, for training batches
    backend.no_padding()
    ends = {theirs.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        ends |= _ids(read_json(folder / name).get("eos_token_id"), folder / name)
    bpe = type(backend.model).__name__ == "BPE"
    corrupt = theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    clean_up = bool(theirs.clean_up_tokenization_spaces and (corrupt or not bpe))
    return Tokenizer(backend, frozenset(ends), theirs.bos_token or "", theirs.eos_token or "",
                     theirs.special_tokens_map, clean_up, backend.encode_special_tokens)


def _ids(given, path):
    """The ids of an eos_token_id entry: one, several, or none."""
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


def _files(folder, include_config=False):
    """The tokenizer files of a folder: those that AutoTokenizer reads."""
    names = (*_VOCABULARY_FILES, *TOKENIZER_SIDE_FILES, *["config.json"] * include_config)
    paths = {*map(folder.joinpath, names), *folder.glob("tokenizer.*.json")}
    return [path for path in paths if path.is_file()]


def _check_files(folder):
    for path in _files(folder):
        check_file_is_fetched(path)
        if (size := path.stat().st_size) > MAX_TOKENIZER_FILE_BYTES:
            raise ValueError(f"{path} has {size} bytes; a tokenizer's file has at most "
                             f"{MAX_TOKENIZER_FILE_BYTES}")
    added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(added, dict) and any(len(i) > MAX_TOKEN_ID_DIGITS for i in added):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder has ids of more than "
                         f"{MAX_TOKEN_ID_DIGITS} digits")


def _check_kind(theirs, base, folder):
    """Raise ValueError for a tokenizer class that splits, joins or cleans text in its own way."""
    kind = type(theirs)
    other = [name for name in UNCHANGED_TOKENIZER_METHODS
             if getattr(kind, name) is not getattr(base, name, None)]
    if other or not getattr(theirs, "is_fast", False):
        raise ValueError(f"{folder}: its tokenizer, transformers' {kind.__name__}, is not one of the "
                         "tokenizers package alone; save it as a PreTrainedTokenizerFast")


def _write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
