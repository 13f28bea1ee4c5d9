"""A hundred strings that tokenizers stumble over, and lists of ids that cut characters."""
import random

PLAIN = r"""
Hello world
 leading and trailing\x20
two  spaces   three
tab\tand
don't can't I'll we've it's HE'S
price: $1,234.56 (50%)
don 't ; do n't ! a , b . c ? i 'm they 're
snake_case camelCase kebab-case CONSTANT
https://example.org/a?b=c&d=%20#e
def f(x):\n    return x**2\n\n\n# end
1 12 123 1234 12345 1234567890
a😀b€c
naïve café résumé Ångström
e\u0301 vs \u00e9, \ufb01 ligature, \u2126 \u212b
日本語のテキスト 中文文本 한국어
العربية עברית हिन्दी ไทย
👨‍👩‍👧‍👦 👍🏽 🇫🇷
\u200b zero \u200d width \ufeff bom
\u00a0non\u2003breaking\u3000spaces
\r\n windows \r old
\x00\x01\x7f control
\u2028line\u2029paragraph\x85next
<s> </s> <unk> <pad>
<|im_start|>user\nhi<|im_end|>\n
<|endoftext|>x<|endoftext|>
a<s>b</s>c
 <s> x </s>\x20
<s><s></s></s>
<| not special |>
<tool>x</tool>y <tool> z
[CLS] a [SEP] [MASK]
▁ underline ▁▁x
Ġ and Ċ and ĉ
## hash ##ing
<0x0A> <0xE2>
\ud7ff \ue000 \ufffd
\ufffd\ufffd\ufffd
𝕳𝖊𝖑𝖑𝖔 𐍈
\U0010ffff \U000e0001
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
x\ny\n\nz\n\n\n
\n\n leading newline
\t\t\tx = 1
!!!???...,,,
""''``
\\n \\t backslash
ÀÈÌÒÙ àèìòù ß ẞ İ ı
ΑΒΓ αβγ ς Σ
½ ² ³ ① Ⅷ
٣٤٥ १२३
ǆ Ǆ ǅ
""".strip("\n").split("\n")
SPACES = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    " \n ",
    "   a",
    "a   ",
    "\n a",
    "a\n",
    "\u3000",
    "a b",
    "ab ",
    ".",
    " .",
]


def hundred() -> list[str]:
    """PLAIN with its escapes read, SPACES, and texts drawn at random from all of Unicode."""
    texts = [line.encode("latin-1", "backslashreplace").decode("unicode_escape") for line in PLAIN] + SPACES
    draws = random.Random(14)
    while len(texts) < 100:
        plane = draws.choice([128, 256, 0x3000, 0xD800, 0x110000])
        codes = [draws.randrange(plane) for _ in range(draws.randrange(1, 30))]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return texts[:100]


def id_lists(size: int, special: list[int]) -> list[list[int]]:
    """Ids as no tokenizer would write them: any order, special ones between, characters cut."""
    draws, found = random.Random(size), [[], [0], [size - 1], special, special * 2]
    for _ in range(40):
        ids = [draws.randrange(size) for _ in range(draws.randrange(1, 40))]
        if special and draws.random() < 0.5:
            ids.insert(draws.randrange(len(ids)), draws.choice(special))
        found.append(ids)
    return found
