"""Known-wrong limits: texts tokenized that cannot fit, stop strings without end, chats that go on for ever.

`ask` reads one body as the server does, up to what the engine would be asked; `live` renders chats, reads
bodies and keeps answers as its threads and processes do. A mutant of the library is patched in meanwhile.
"""
import asyncio
import contextlib
import functools
import json
import threading
import tracemalloc

from pydantic import ConfigDict

from nanoinfra.lab.check import Check, Wrong
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.text import Text
from nanoinfra.serve import exchange, limits
from nanoinfra.serve.answers import ChatAnswer, CompletionAnswer
from nanoinfra.serve.choice import Choice
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.loop import Ready
from nanoinfra.serve.preprocess import Preprocessor
from nanoinfra.serve.protocol import Chat, Completion, read, requests_of
from nanoinfra.serve.requests import Event, Logprob
from nanoinfra.serve.templates import TemplateProcess
from nanoinfra.serve.writer import Writer

CONTEXT, HI = 64, [{"role": "user", "content": "hi"}]
requests, running = Check("limits of a request"), Check("limits while it runs")


class Letters:
    """A tokenizer of single letters that counts them."""

    def __init__(self):
        self.seen = 0

    def encode_batch(self, texts, add_special_tokens):
        self.seen += sum(map(len, texts))
        return [type("Encoding", (), {"ids": [ord(letter) % 90 for letter in text]}) for text in texts]

    def decode(self, ids, skip_special_tokens):
        return "a" * len(ids)

    def get_vocab(self):
        return {"a": 0, "abcd": 1}


def ask(kind, **body):
    """(why it was refused, or None; characters that were tokenized; chats rendered; fields kept)."""
    letters, rendered, kept = Letters(), [], ()
    ready = Ready({"context": CONTEXT, "vocab": 97}, Text(letters), "template")
    try:
        question = read(kind, json.dumps(body).encode())
        kept = question.model_extra or ()
        asked = requests_of(question, "r", ready, lambda *chat: rendered.append(chat) or "abc")
        form = ChatAnswer if kind is Chat else CompletionAnswer
        form(question, "r", "m", asked, ready.text)
    except Refused as refused:
        return str(refused), letters.seen, len(rendered), kept
    return None, letters.seen, len(rendered), kept


def _refuses(name, kind, body, says):
    @requests.criterion(name, "property")
    def _(subject):
        why, *_ = subject(kind, **body)
        if says not in (why or ""):
            raise Wrong(f"{str(body)[:80]}: want a refusal with {says!r}, got {why!r}")
    return name


@requests.criterion("a text that no context spells is not tokenized", "property")
def _(subject):
    why, seen, _, _ = subject(Completion, prompt="a" * 5 * CONTEXT)
    if seen or not why:
        raise Wrong(f"a prompt of {5 * CONTEXT} characters, at most {4 * CONTEXT} fit: {seen} were tokenized")


@requests.criterion("a chat that no context spells is not rendered", "property")
def _(subject):
    why, _, rendered, _ = subject(Chat, messages=[{"role": "user", "content": "a" * 5 * CONTEXT}])
    if rendered or not why:
        raise Wrong(f"a message of {5 * CONTEXT} characters was rendered; at most {4 * CONTEXT} fit")


@requests.criterion("what nobody knows is dropped", "property")
def _(subject):
    *_, kept = subject(Completion, prompt="a", max_tokens=1, unheard_of=[1])
    if kept:
        raise Wrong(f"a field that nobody knows is kept: {kept}")


PROMPTS = _refuses("prompts are few", Completion, {"prompt": ["a"] * 2000, "max_tokens": 1}, "2000 prompts")
CHOICES = _refuses("choices are few", Completion, {"prompt": ["a"] * 99, "n": 64, "max_tokens": 1}, "choices")
TOTAL = _refuses("prompts are short together", Completion, {"prompt": [[1] * 60] * 100, "max_tokens": 1},
                 "tokens in one request")
SAID = _refuses("an answer has few tokens", Completion, {"prompt": ["a"] * 99, "max_tokens": 60}, "come to")
PROBS = _refuses("an answer has few log-probabilities", Completion,
                 {"prompt": [1] * 30, "n": 64, "echo": True, "logprobs": 90, "max_tokens": 1}, "log-probabil")
STOPS = _refuses("stop strings are short", Completion, {"prompt": "a", "stop": "a" * 5000}, "stop strings")
BIASES = _refuses("biases are few", Completion,
                  {"prompt": "a", "logit_bias": {f"w{i}": 1 for i in range(2000)}}, "2000 tokens; give")
DIGITS = _refuses("numbers have few digits", Completion, {"prompt": "a", "n": int("7" * 400)}, "less than")
CALLS = _refuses("a message has few calls", Chat,
                 {"messages": [{"role": "u", "tool_calls": [[]] * 5000}]}, "128 items")
SPELLED, RENDERED, DROPPED = (each.name for each in requests.criteria[:3])


class Live:
    """The parts that run; `kind` makes the threads."""

    def __init__(self, kind):
        self.threads = kind

    def render(self, messages, template):
        """What a child says of a chat that has 0.2 s of the processor; the clock gives it 3 s."""
        child = TemplateProcess(seconds=0.2)
        child.render("", HI, Text(None))
        clock = threading.Timer(3, child.kill)
        clock.start()
        try:
            return child.render(template, messages, Text(None))
        except ValueError as error:
            return str(error)
        finally:
            clock.cancel()
            child.close()

    def beside(self, slow, quick):
        """Does work of kind `quick` end while `slow` goes on in all its threads?"""
        threads, go = self.threads(), threading.Event()

        async def both():
            waiting = [asyncio.ensure_future(threads.run(slow, go.wait)) for _ in range(8)]
            await asyncio.sleep(0.01)
            done, _ = await asyncio.wait([asyncio.ensure_future(threads.run(quick, str))], timeout=1.0)
            go.set()
            await asyncio.gather(*waiting)
            return bool(done)
        try:
            return asyncio.run(both())
        finally:
            threads.close()

    def large(self, count):
        """How many of `count` large bodies are taken at once."""
        threads, taken = self.threads(), []
        with contextlib.ExitStack() as places, contextlib.suppress(Refused):
            for _ in range(count):
                taken.append(places.enter_context(threads.place_for_large()))
        threads.close()
        return len(taken)

    def body(self, most):
        """(status, bytes read) of a body without end."""
        class Endless:
            sent = 0

            async def stream(self):
                while self.sent < 100 * most:
                    self.sent += most
                    yield b" " * most
        endless = Endless()
        try:
            asyncio.run(exchange._body(endless, most, lambda: None))
        except Refused as refused:
            return refused.status, endless.sent
        return 200, endless.sent

    def kept(self, tokens, top):
        """Bytes that each log-probability takes in an answer that is not streamed."""
        question = read(Chat, json.dumps({"messages": HI, "logprobs": True}).encode())
        ready = Ready({"context": 4096, "vocab": 97}, Text(Letters()), "template")
        asked = requests_of(question, "r", ready, lambda *_: "a")
        answer = ChatAnswer(question, "r", "m", asked, ready.text)
        tracemalloc.start()
        for _ in range(tokens):
            likely = [(1000 + i, -0.5 - i) for i in range(top)]
            answer.add(Event("r", 0, "a", [7], [Logprob(7, -0.25, likely)]))
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size / (tokens * (1 + top))

    def looks(self, stop):
        """How often a text of 60 letters is held against a stop string that begins with none of them."""
        class Counted(str):
            count = 0

            def startswith(self, *given):
                self.count += 1
                return super().startswith(*given)

            def __getitem__(self, part):
                self.count += 1
                return super().__getitem__(part)
        counted = Counted(stop)
        writer = Writer(lambda ids: "b" * len(ids), (counted,))
        for _ in range(60):
            writer.push(1)
        return counted.count


def live(part, *given, kind=Preprocessor):
    """What a part of `Live` does."""
    return getattr(Live(kind), part)(*given)


def _must(name, part, given, holds, want):
    @running.criterion(name, "resource")
    def _(subject):
        if not holds(got := subject(part, *given)):
            raise Wrong(f"{part}{str(given)[:100]}: want {want}, got {str(got)[:100]}")
    return name


FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BESIDE = _must("a slow chat keeps no text waiting", "beside", ("chats", "texts"), bool, "both")
LARGE = _must("few large bodies are taken at once", "large", (9,), lambda n: n == 4, 4)
BODY = _must("a body without end is refused", "body", (99,), lambda got: got == (413, 17 * 99), "413")
KEPT = _must("a log-probability is kept in 12 bytes", "kept", (200, 50), lambda size: size < 20, "< 20")
LOOKS = _must("a stop string costs as much as the text", "looks", ("a" * 1000,), lambda n: n <= 60, "<= 60")
LOOPS = _must("a chat that goes on is ended", "render", (HI, FOREVER), lambda said: "0.2 s" in said, "an end")
GROWS = _must("a chat that grows is ended", "render", (HI, "{{ ('x' * 2 ** 30) | length }}"),
              lambda said: "emory" in said, "no memory")
LONG = _must("a chat is short when it is rendered", "render", (HI, "{{ 'x' * 2 ** 22 }}"),
             lambda said: "more than 2097152" in said, "a refusal")



class Keeps(Completion):
    model_config = ConfigDict(extra="allow")


class OneForAll(Preprocessor):               # chats and texts wait for the same threads
    async def run(self, kind, call, *args):
        return await super().run("texts", call, *args)


class TakesAll(Preprocessor):
    @contextlib.contextmanager
    def place_for_large(self):
        yield


class KeepsEvents(Choice):
    def add(self, event):
        self.events = [*getattr(self, "events", []), event]


def of_prompts_alone(chars, context, longest, check=limits.check_chars):
    """As if messages were not counted before they are rendered."""
    if chars == 5 * CONTEXT:
        check(chars, context, longest)


def looks_at_every_beginning(text, stop):
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def anything(*given):
    """A check that lets everything pass."""


def child(name, instead):
    """What starts a child that has `instead` of a guard."""
    return f"import nanoinfra.serve.templates as t; t.{name} = {instead}; t.main()"


REQUESTS = {
    "a text is tokenized however long": ("limits:check_chars", anything, SPELLED),
    "a message is rendered however long": ("limits:check_chars", of_prompts_alone, RENDERED),
    "prompts are counted last": ("limits:MOST_PROMPTS", 1 << 30, PROMPTS),
    "choices without end": ("limits:check_choices", anything, CHOICES),
    "prompts of any length together": ("limits:check_prompt_tokens", anything, TOTAL),
    "an answer of any length": ("limits:check_answer", anything, SAID),
    "log-probabilities without end": ("limits:most_logprobs", lambda context: 1 << 30, PROBS),
    "stop strings without end": ("limits:check_stops", anything, STOPS),
    "biases without end": ("limits:MOST_BIASES", 1 << 30, BIASES)}
RUNNING = {
    "a child has all the time": ("templates:START", child("signal.setitimer", "lambda *_: None"), LOOPS),
    "a child has all the memory": ("templates:START", child("resource.setrlimit", "lambda *_: None"), GROWS),
    "a rendered chat has any length": ("templates:START", child("MOST_RENDERED", "1 << 40"), LONG),
    "a body is kept to its end": ("exchange:_refusal", anything, BODY),
    "events are kept as they come": ("answers:Choice", KeepsEvents, KEPT),
    "each beginning of a stop string is tried": ("writer:_overlap", looks_at_every_beginning, LOOKS)}
MUTANTS = [
    *(Mutant(name, requests, patched(ask, f"nanoinfra.serve.{target}", instead), rejected_by)
      for name, (target, instead, rejected_by) in REQUESTS.items()),
    Mutant("unknown fields are kept", requests,
           lambda kind, **body: ask(Keeps if kind is Completion else kind, **body), DROPPED),
    *(Mutant(name, running, patched(live, f"nanoinfra.serve.{target}", instead), rejected_by)
      for name, (target, instead, rejected_by) in RUNNING.items()),
    Mutant("chats and texts share their threads", running, functools.partial(live, kind=OneForAll), BESIDE),
    Mutant("large bodies are taken as they come", running, functools.partial(live, kind=TakesAll), LARGE)]
