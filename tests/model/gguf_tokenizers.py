"""Small tokenizers of both kinds, learned here with plain Python, and the strings to try them with.

Merges are learned across spaces and digits, so that a text cut in another way than llama.cpp's has other ids.
"""
from collections import Counter

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
STRINGS = (
    "", " ", "  ", "   ", "\n", "\n\n", "\t", " \n", "\r\n", "a", " a", "a ", "  a  b   c    d", "\ta\t\tb",
    "a\n\n\nb", "Hello world", "Hello, world!", " Hello", "Hello  world", "hello HELLO HeLLo hELLO",
    "it's we'll I'M YOU'RE they'D", "don't can't won't 'tis", "'s 't 're", "O'Neil's", "x's't",
    "It's 5 o'clock.", "\u2019s we\u2019ll", "'\u017fs", "1", "12", "123", "1234", "12345", "1234567",
    "1 2 3", "3.14", "1,000,000", "2024-11-30", "a1b22c333d4444", " 12 345", "x\xb2\xbd\u2167\u0661\u0662",
    "100%", "$5.00", "v1.2.3", "0x1F", "1e-5", "!", "?!", "...", " ?!", "a.b", "a, b; c: d", "(a) [b] {c}",
    "<<>>", "a+b=c", "x^2~y|z", "`code`", "#tag @user", "https://example.org/a?b=c&d=e", "a/b\\c",
    "--- ***", "!!!\n\n", "?\r\n?", "; \n;", "/\n/", "def f(x):\n    return x ** 2\n",
    "for (i = 0; i < n; i++) {\n\tx[i] = 0;\n}", "{\"a\": [1, 2], \"b\": null}", "caf\xe9 na\xefve",
    "cafe\u0301", "\xc9COLE \xe9cole", "Stra\xdfe \xc4\xd6\xdc", "\u0130stanbul", "\u01c5",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5", "\u65e5\u672c\u8a9e \u4e2d\u6587",
    "\u3053\u3093\u306b\u3061\u306f\u3002", "\ud55c\uad6d\uc5b4", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "\U0001f642",
    "a\U0001f600b\u20acc", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f", "\xa0a\xa0b", "a\u3000b", "a\u200bb", "\u2028x\u2029", "\ufeffx", "\x00a",
    "\x7f\x1b[0m", "\ue000", "\ufffd", "\u2581a\u2581", "<0x0A>", "<s>", "</s>", "<s> a</s> b", "a<s>b",
    "<|user|>\nHi<|end|>\n", " <|user|> x", "<|user|>", "<|end|><|user|>a", "<tool>a</tool>", "a <tool> b",
    "<unk>", "<|us", "a" * 20, "ababababa", "the the the", "The quick brown fox jumps over the lazy dog.",
    " " * 20 + "x", "a" * 60, "xyzzy " * 8)
CORPUS = " ".join(STRINGS[15:104]) * 2 + (
    " the cat sat on the mat, and the dog ate 12 of 345 bones in 2024; it's the end of the story. the other "
    "one isn't here: we'll see (or not)... HELLO Hello hello  there   was    once\n\n a\n the\tx")
CONTROL, USER_DEFINED, UNKNOWN, BYTE, NORMAL = 3, 4, 2, 6, 1
MARKS = {"<s>": CONTROL, "</s>": CONTROL, "<|user|>": CONTROL, "<|end|>": CONTROL, "<|endoftext|>": CONTROL,
         "<tool>": USER_DEFINED, "</tool>": USER_DEFINED}
NAMED = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "[EOS]", "<|end_of_text|>",
         "<eos>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>", "<|fim_suffix|>",
         "<|fim_middle|>", "<|im_start|>")
PRE = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o", "default")


def tokenizers():
    """{name: what `write_model` is given} of every tokenizer that is tried."""
    found = {f"bpe, {pre}": {"tokenizer": bpe(pre)} for pre in PRE}
    found["bpe, with both ends"] = {"tokenizer": bpe("gpt-2", add_bos_token=True, add_eos_token=True)}
    found["bpe, ends by name and by key"] = {"tokenizer": bpe("gpt-2", MARKS | dict.fromkeys(NAMED, NORMAL),
                                                              eot_token_id=2, fim_pad_token_id=3)}
    found["spm"] = {"tokenizer": spm()}
    found["spm, no prefix"] = {"tokenizer": spm(add_space_prefix=False, add_bos_token=False)}
    found["spm, with both ends"] = {"tokenizer": spm(add_eos_token=True)}
    found["spm, phi-3"] = {"tokenizer": spm(), "general": {"general.name": "Phi-3 tiny"}}
    return found


def bpe(pre, marks=MARKS, **more):
    """Byte-level BPE, with `marks` after its own tokens."""
    letters = alphabet()
    merges = learned([letters[b] for b in CORPUS.encode()], 260)
    tokens = [*letters.values(), *(a + b for a, b in merges)]
    return keys("gpt2", tokens, [NORMAL] * len(tokens), more | {
        "pre": pre, "merges": [f"{a} {b}" for a, b in merges], "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1}, marks)


def spm(**more):
    """Sentencepiece's BPE: bytes, characters and unions, with scores; runs of spaces have one score."""
    text = CORPUS.replace(" ", SPACE)
    few = SPACE + "\u00e9\u043f\u0440"       # other characters become bytes
    letters = sorted({c for c in text if c.isascii() and c.isprintable() or c in few})
    merges = [pair for pair in learned(list(text), 300) if set("".join(pair)) <= set(letters)]
    unions = list(dict.fromkeys(a + b for a, b in merges))
    unions = [SPACE * n for n in range(2, 9)] + [union for union in unions if union.strip(SPACE)]
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *unions, *letters]
    kinds = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * (len(unions) + len(letters))]
    scores = [0.0] * 257 + [-1e9] * 7 + [-float(i) for i in range(1, len(unions) + len(letters) - 6)]
    marks = {"scores": scores + [0.0] * len(MARKS), "bos_token_id": len(tokens),
             "eos_token_id": len(tokens) + 1, "unknown_token_id": 0, "pre": "default"}
    return keys("llama", tokens, kinds, more | marks)


def keys(model, tokens, kinds, more, marks=MARKS):
    found = {"model": model, "tokens": [*tokens, *marks], "token_type": [*kinds, *marks.values()]} | more
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def alphabet():
    """GPT-2's visible character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(rest)}


def learned(parts, count):
    """The `count` most frequent neighbours, one after the other, each joined before the next is sought."""
    merges = []
    while len(merges) < count:
        pairs = Counter(zip(parts, parts[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined, i = [], 0
        while i < len(parts):
            both = tuple(parts[i:i + 2]) == best
            joined.append(parts[i] + parts[i + 1] if both else parts[i])
            i += 2 if both else 1
        parts = joined
    return merges
