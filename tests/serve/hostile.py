"""What a stranger may send to stall the server, to fill its memory, or to make a refusal fail.

CASES are one of each with the status that is right; KINDS draw any number of them. Both follow from the
model's `context` and `vocab`, so that a real engine can be asked the same.
"""
import json
from collections.abc import Callable
from random import Random

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
REFUSALS = {400, 404, 408, 413, 415, 422, 429}
LETTERS = "abc \n\t.,!?éß日\U0001f642<|>\0\u0301\u200f12"
DIGITS = int("7" * 400)
HI = [{"role": "user", "content": "hi"}]


def body(**fields) -> bytes:
    return _compact({"prompt": "a", "max_tokens": 1, **fields})


def chat(**fields) -> bytes:
    return _compact({"messages": HI, "max_tokens": 1, **fields})


def _compact(data):
    return json.dumps(data, separators=(",", ":")).encode()


def cases(context: int, vocab: int) -> dict[str, tuple[str, bytes, int]]:
    """{name: (path, body, status)}: each is refused, whatever the model is."""
    many = 1 << 18
    completions = {
        "8 MB of prompt": (body(prompt="a" * (8 << 20)), 413),
        "a prompt that no context spells": (body(prompt="a" * 500_000), 400),
        "digits, a token each": (body(prompt="7" * (2 * context)), 400),
        "token ids without end": (body(prompt=[7] * (context + 1)), 400),
        "a token of 400 digits": (body(prompt=[DIGITS]), 400),
        "prompts without end": (body(prompt=["a"] * 100_000), 400),
        "lists of ids without end": (body(prompt=[[7]] * 100_000), 400),
        "many long prompts": (body(prompt=["a b " * 1000] * 120, max_tokens=context - 1), 400),
        "a stop string of 500 kB": (body(stop="a" * 500_000), 400),
        "stop strings without end": (body(stop=["a"] * 100_000), 400),
        "a bias for each token": (body(logit_bias=dict.fromkeys(range(49152), 1)), 400),
        "biases for words": (body(logit_bias={f"w{i}": 1 for i in range(40_000)}), 400),
        "a bias for a token of 400 digits": (body(logit_bias={str(DIGITS): 1}), 400),
        "an answer of log-probabilities": (
            body(prompt=[7] * (context // 2), n=64, echo=True, logprobs=min(100, vocab)), 400),
        "choices without end": (body(prompt=["a"] * 1000, n=64), 400),
        "an echo without end": (body(prompt=[" " * 4000] * 100, n=10, echo=True), 400),
        "400 digits of everything": (body(n=DIGITS), 400),
        "lists for an unsupported field": (body(documents=[[]] * 150_000), 400),
        "deep lists": (b'{"prompt": "a", "x": ' + b"[" * many + b"}", 400),
        "deep objects": (b'{"x": ' * 50_000, 400),
        "half a surrogate pair": (b'{"prompt": "\\ud800"}', 400),
        "no number": (b'{"prompt": "a", "temperature": NaN}', 400),
        "infinity": (b'{"prompt": "a", "temperature": 1e999}', 400),
        "a model's name of 500 kB": (body(model="m" * 500_000), 404),
        "no UTF-8": (b"\xff" * 1000, 400),
        **{f"{name} of 400 digits": (body(**{name: DIGITS}), 400)
           for name in ("top_k", "logprobs", "max_tokens", "seed", "temperature", "min_p")}}
    chats = {
        "messages that are none": (b'{"messages": [' + b"{}," * 170_000 + b"{}]}", 400),
        "messages without end": (chat(messages=HI * 12_000), 400),
        "a role that is odd": (chat(messages=[{"role": "odd"}]), 400),
        "parts of no text": (chat(messages=[{"role": "user", "content": [{}] * 100_000}]), 400),
        "a message that no context spells": (
            chat(messages=[{"role": "user", "content": "a" * 500_000}]), 400),
        "calls without end": (chat(messages=[{"role": "user", "tool_calls": [[]] * 120_000}]), 400),
        "top_logprobs of 400 digits": (chat(logprobs=True, top_logprobs=DIGITS), 400),
        "n of 400 digits": (chat(n=DIGITS), 400),
        "many answers with log-probabilities": (
            chat(n=64, logprobs=True, top_logprobs=min(100, vocab), max_tokens=context // 2), 400),
        "tools without end": (chat(tools=[{"type": "function", "function": {"name": "f"}}] * 5000), 400)}
    return ({name: (COMPLETIONS, *case) for name, case in completions.items()}
            | {name: (CHATS, *case) for name, case in chats.items()})


def allowed(context: int, vocab: int) -> dict[str, tuple[str, bytes]]:
    """{name: (path, body)} of what is as large as may be, and is answered."""
    most = (1 << 19) - 100                   # bytes of a body
    return {
        "unknown fields": (COMPLETIONS, body(x=[[]] * (most // 3))),
        "unknown names": (COMPLETIONS, body(**{f"x{i}": 1 for i in range(30_000)})),
        "unknown fields of a message": (CHATS, chat(messages=[{**HI[0], "x": [[]] * 120_000}])),
        "calls of a message": (CHATS, chat(messages=[{**HI[0], "tool_calls": [[[]] * (context // 2)]}])),
        "all log-probabilities at once": (
            COMPLETIONS, body(prompt=[7] * 600, echo=True, logprobs=min(100, vocab), max_tokens=1)),
        "the same in a stream": (
            COMPLETIONS, body(prompt=[7] * 600, echo=True, logprobs=min(100, vocab), stream=True)),
        "64 choices that echo": (COMPLETIONS, body(prompt="ab " * 1000, echo=True, n=64)),
        "as many messages as fit": (CHATS, chat(messages=[{"role": "u", "content": ""}] * (context // 8)))}


def _number(draws, *usual):
    odd = [0, -1, 1e-40, 5e-324, 1e300, 2 ** 63, -2 ** 64, DIGITS, True, "1", [], {}, None]
    return draws.choice([*usual, *odd])


def _text(draws, most):
    several = "".join(draws.choices(LETTERS, k=9))
    pattern = draws.choice(["a", " ", "7", "\0", "日", "<|im_start|>", "ab ", several])
    return (pattern * (most // len(pattern) + 1))[:draws.randrange(most)]


def _numbers(draws, context, vocab):
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "n",
             "repetition_penalty", "max_tokens", "logprobs", "best_of", "min_tokens")
    return COMPLETIONS, body(**{name: _number(draws, 0.5, 1, 2) for name in draws.sample(names, 3)})


def _temperatures(draws, context, vocab):
    cold = 10.0 ** draws.uniform(-320, 3)
    return COMPLETIONS, body(temperature=cold, top_p=draws.choice([1, 1e-9, 0.5]), max_tokens=2)


def _prompts(draws, context, vocab):
    return COMPLETIONS, body(prompt=_text(draws, 10 ** draws.randint(2, 6)))


def _ids(draws, context, vocab):
    size = draws.randrange(1, 2 * context)
    ids = draws.choices([0, vocab - 1, draws.randrange(vocab)], k=size)
    ids[draws.randrange(size)] = draws.choice([0, vocab, -1, DIGITS, 2 ** 31, 2 ** 63])
    return COMPLETIONS, body(prompt=draws.choice([ids, [ids] * draws.randrange(1, 4), [[7]] * 2000]))


def _stops(draws, context, vocab):
    size, count = 10 ** draws.randint(0, 5), draws.randrange(1, 80)
    return COMPLETIONS, body(stop=[_text(draws, size + 1) for _ in range(min(count, 400_000 // size))])


def _biases(draws, context, vocab):
    size = 10 ** draws.randint(0, 5)
    keys = {draws.choice([i % vocab, vocab + i, -i, f"w{i}", DIGITS + i]) for i in range(min(size, 3000))}
    return COMPLETIONS, body(logit_bias={str(key): draws.choice([1, -100, 1e300, 101]) for key in keys})


def _fields(draws, context, vocab):
    value = draws.choice([[], {}, 1.5, "ab", None])
    return draws.choice([(COMPLETIONS, body(x=[value] * draws.randrange(100_000))),
                         (CHATS, chat(messages=[{**HI[0], "x": [value] * draws.randrange(50_000)}]))])


def _answers(draws, context, vocab):
    """Large in n, echo and log-probabilities; some may be answered."""
    return COMPLETIONS, body(prompt=[7] * draws.choice([1, 9, context // 4]),
                             n=draws.choice([1, 2, 64, 65, 1000]), echo=draws.random() < 0.5,
                             logprobs=draws.choice([None, 1, 100, 101]),
                             max_tokens=draws.choice([0, 1, 2]), stream=draws.random() < 0.5)


def _chats(draws, context, vocab):
    parts = [{"type": "text", "text": "x"}] * 99
    content = draws.choice([_text(draws, 10 ** draws.randint(1, 5)), None, [], parts])
    role = draws.choice(["user", "system", "odd", "", "{{ 7 * 7 }}", "\0", "r" * 999])
    count = draws.choice([1, 3, 5000]) if len(content or "") < 100 else 1
    return CHATS, chat(messages=[{"role": role, "content": content}] * count)


def _bytes(draws, context, vocab):
    """No JSON, or JSON that is cut or broken at any byte."""
    good = bytearray(body(prompt=_text(draws, 50), n=1))
    good[draws.randrange(len(good))] = draws.randrange(256)
    broken = [bytes(good), bytes(good[:draws.randrange(len(good))]), draws.randbytes(draws.randrange(200)),
              draws.choice([b"[", b'{"a":', b'["a",']) * draws.randrange(50_000), b'{"prompt": "\\ud800"}',
              b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}', b'{"n": 1e999, "prompt": "a"}',
              b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', b" " * draws.randrange(2 << 20)]
    return draws.choice([COMPLETIONS, CHATS]), draws.choice(broken)


KINDS: dict[str, Callable[[Random, int, int], tuple[str, bytes]]] = {
    "numbers": _numbers, "temperatures": _temperatures, "prompts": _prompts, "ids": _ids, "stops": _stops,
    "biases": _biases, "fields": _fields, "answers": _answers, "chats": _chats, "bytes": _bytes}


def draw(kind: str, draws: Random, context: int, vocab: int) -> tuple[str, dict[str, str], bytes]:
    """(path, headers, body) of one more request of this kind; right is 200 or one of REFUSALS."""
    path, content = KINDS[kind](draws, context, vocab)
    return path, JSON, content
