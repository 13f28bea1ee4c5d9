"""Known-wrong limits while the server runs: chats that go on for ever, memory that nobody gets back.

`live` renders chats, reads bodies and keeps answers as the server's threads and processes do; a mutant of the
library is patched in meanwhile.
"""
import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Logprob, Request, RequestOutput
from nanoinfra.serve.server import generation_handlers
from nanoinfra.serve.server.openai.chat_template_process import ChatTemplateProcess
from nanoinfra.serve.server.openai.choice_accumulator import ChoiceAccumulator
from nanoinfra.serve.server.openai.completion_requests import ChatCompletionRequest, parse_request_body
from nanoinfra.serve.server.openai.completion_responses import ChatCompletionResponse
from nanoinfra.serve.server.preprocess_requests import RequestPreprocessor
from tests.serve.letters import letters

HI = [{"role": "user", "content": "hi"}]
running = Check("limits while it runs")


class Live:
    """The parts that run; `kind` makes the threads."""

    def __init__(self, kind):
        self.threads = kind

    def render(self, messages, template):
        """What a child says of a chat that has 0.2 s of the processor; after 2 s it is ended from here."""
        child, done = ChatTemplateProcess(cpu_seconds=0.2), threading.Event()
        child.render_chat_template("", HI, Tokenizer(None))
        watch = threading.Thread(target=self._watch, args=(child, used(child.process.pid) + 2, done))
        watch.start()
        try:
            return child.render_chat_template(template, messages, Tokenizer(None))
        except ValueError as error:
            return str(error)
        finally:
            done.set()
            watch.join()
            child.close()

    def _watch(self, child, most, done):
        while not done.wait(0.02):
            if child.process and used(child.process.pid) > most:
                child.kill()

    def beside(self, slow, quick):
        """Does work of kind `quick` end while `slow` goes on in all its threads?"""
        threads, go = self.threads(), threading.Event()

        async def both():
            waiting = [asyncio.ensure_future(threads.run_in_pool(slow, go.wait)) for _ in range(8)]
            await asyncio.sleep(0.01)
            done, _ = await asyncio.wait([asyncio.ensure_future(threads.run_in_pool(quick, str))],
                                         timeout=1.0)
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
        with contextlib.ExitStack() as places, contextlib.suppress(APIError):
            for _ in range(count):
                taken.append(places.enter_context(threads.reserve_large_body_slot()))
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
            asyncio.run(generation_handlers._read_body(endless, most, lambda: None))
        except APIError as refused:
            return refused.status_code, endless.sent
        return 200, endless.sent

    def freed(self, *guards):
        """Bytes that four threads keep of 24 MB which each has freed, in a process without `guards`."""
        without = "".join(f"preprocess.{guard} = lambda: None\n" for guard in guards)
        code = "from nanoinfra.serve.server import preprocess_requests as preprocess\n" + without + FILL
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(said.stdout)

    def kept(self, tokens, top):
        """Bytes that each log-probability takes in an answer that is not streamed."""
        question = parse_request_body(ChatCompletionRequest,
                                      json.dumps({"messages": HI, "logprobs": True}).encode())
        answer = ChatCompletionResponse(question, "r", "m", [Request("r", [1])], Tokenizer(None))
        tracemalloc.start()
        for _ in range(tokens):
            likely = [(1000 + i, -0.5 - i) for i in range(top)]
            answer.add_output(RequestOutput("r", 0, "a", [7], [Logprob(7, -0.25, likely)]))
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
        writer = StopStringDetokenizer(letters(first=97, n=2), (counted,))
        for _ in range(60):
            writer.push_token(1)
        return counted.count


FILL = """
threads, block = preprocess.RequestPreprocessor(), 24 << 20
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before = resident()
for pool in threads.thread_pools.values():
    for _ in range(3):
        pool.submit(lambda: len(bytearray(block))).result()
threads.close()
print(resident() - before)
"""


def used(pid):
    """Seconds of the processor that a process has used; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def live(part, *given, kind=RequestPreprocessor):
    """What a part of `Live` does."""
    return getattr(Live(kind), part)(*given)


def _must(name, part, given, holds, want):
    @running.criterion(name, "resource")
    def _(subject):
        if not holds(got := subject(part, *given)):
            raise CriterionNotMet(f"{part}{str(given)[:100]}: want {want}, got {str(got)[:100]}")
    return name


FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BESIDE = _must("a slow chat keeps no text waiting", "beside", ("chats", "texts"), bool, "both")
LARGE = _must("few large bodies are taken at once", "large", (9,), lambda n: n == 4, 4)
BODY = _must("a body without end is refused", "body", (99,), lambda got: got == (413, 17 * 99), "413")
KEPT = _must("a log-probability is kept in 12 bytes", "kept", (200, 50), lambda size: size < 20, "< 20")
LOOKS = _must("a stop string costs as much as the text", "looks", ("a" * 1000,), lambda n: n <= 60, "<= 60")
FREED = _must("what is freed is given back", "freed", (), lambda size: size < 8 << 20, "< 8 MB")
LOOPS = _must("a chat that goes on is ended", "render", (HI, FOREVER), lambda said: "0.2 s" in said, "an end")
GROWS = _must("a chat that grows is ended", "render", (HI, "{{ ('x' * 2 ** 30) | length }}"),
              lambda said: "emory" in said, "no memory")
LONG = _must("a chat is short when it is rendered", "render", (HI, "{{ 'x' * 2 ** 22 }}"),
             lambda said: "more than 2097152" in said, "a refusal")


class OneForAll(RequestPreprocessor):               # chats and texts wait for the same threads
    async def run_in_pool(self, pool, call, *args):
        return await super().run_in_pool("texts", call, *args)


class TakesAll(RequestPreprocessor):
    @contextlib.contextmanager
    def reserve_large_body_slot(self):
        yield


class KeepsEvents(ChoiceAccumulator):
    def append_output(self, event):
        self.events = [*getattr(self, "events", []), event]


def looks_at_every_beginning(text, stop):
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def child(name, instead):
    """What starts a child that has `instead` of a guard."""
    return f"import nanoinfra.serve.server.openai.chat_template_process as t; t.{name} = {instead}; t.main()"


RUNNING = {
    "a child has all the time": ("server.openai.chat_template_process:_CHILD_PROGRAM",
                                 child("signal.setitimer", "lambda *_: None"), LOOPS),
    "a child has all the memory": ("server.openai.chat_template_process:_CHILD_PROGRAM",
                                   child("resource.setrlimit", "lambda *_: None"), GROWS),
    "a rendered chat has any length": ("server.openai.chat_template_process:_CHILD_PROGRAM",
                                       child("_MAX_RENDERED_BYTES", "1 << 40"), LONG),
    "a body is kept to its end": ("server.generation_handlers:_body_error", lambda *_: None, BODY),
    "events are kept as they come": ("server.openai.completion_responses:ChoiceAccumulator", KeepsEvents,
                                     KEPT),
    "each beginning of a stop string is tried": ("engine.detokenizer:_overlap", looks_at_every_beginning,
                                                 LOOKS)}
MUTANTS = [
    *(Mutant(name, running, patched(live, f"nanoinfra.serve.{target}", instead), rejected_by)
      for name, (target, instead, rejected_by) in RUNNING.items()),
    Mutant("chats and texts share their threads", running, functools.partial(live, kind=OneForAll), BESIDE),
    Mutant("large bodies are taken as they come", running, functools.partial(live, kind=TakesAll), LARGE),
    Mutant("glibc keeps what is freed", running,
           lambda part, *given: live(part, *given,
                                     *["configure_malloc_to_return_memory"] * (part == "freed")), FREED)]
