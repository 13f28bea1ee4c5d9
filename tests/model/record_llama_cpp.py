"""Records what llama.cpp makes of the files of gguf_files.py, for tests that run without it.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python gguf
    PYTHONPATH=. /tmp/llama/bin/python -m tests.model.record_llama_cpp

writes tests/model/recorded/llama_cpp.json. Caches are float32 and attention is plain, so that what differs is
the maths; with quantised weights llama.cpp quantises the inputs too, and is near only.
"""
import json
import sys
import tempfile
from pathlib import Path

from tests.model import gguf_files, gguf_tokenizers

RECORDED = Path(__file__).parent / "recorded" / "llama_cpp.json"
SHOWN = 12                                   # logits of so many ids are kept, at every position


def ask_logits(path, tokens):
    """(T, V), as llama.cpp computes them."""
    import llama_cpp
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False,
                            n_threads=1, n_gpu_layers=0, verbose=False)
    model.eval(tokens)
    return model.scores[:len(tokens)].copy()


def ask_ids(path, strings):
    """(ids of each string, with what the file puts around it; ids that end an answer)."""
    import llama_cpp
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    ends = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    ids = [model.tokenize(string.encode(), add_bos=True, special=True) for string in strings]
    return ids, ends


def shown(logits, how):
    """The rows that are kept: all positions, of quantised types the last two."""
    return logits[-2:] if "kind" in how else logits


def main():
    """Ask about every file, and write the answers."""
    answers = {"logits": {}, "ids": {}, "ends": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (architecture, how) in gguf_files.models().items():
            path = gguf_files.write_model(Path(folder, "m.gguf"), architecture, **how)
            logits = ask_logits(path, gguf_files.prompt())
            answers["logits"][name] = shown(logits, how)[:, :SHOWN].astype(float).round(5).tolist()
            print(f"{name}: logits spread {logits.std():.2f}", file=sys.stderr)
        for name, tokenizer in gguf_tokenizers.tokenizers().items():
            path = gguf_files.write_model(Path(folder, "t.gguf"), "llama", **tokenizer)
            answers["ids"][name], answers["ends"][name] = ask_ids(path, gguf_tokenizers.STRINGS)
    RECORDED.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(f'{kind} {name}')}: {json.dumps(found, separators=(',', ':'))}"
             for kind, each in answers.items() for name, found in each.items()]
    RECORDED.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
