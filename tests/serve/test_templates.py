"""Chats rendered in a child process: the same text, an end in time, and nothing left."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanoinfra.model.tokenizer import Text, render_chat
from nanoinfra.serve.server.openai import chat_templates
from nanoinfra.serve.server.openai.chat_templates import TemplateProcess
from tests.processes import children
from tests.serve.beating import LOOP
from tests.serve.fake import TEMPLATE
from tests.serve.host import ROOT, until

TEXT = Text(None, bos="<s>", eos="</s>")
HI = [{"role": "user", "content": "h\u00e9 \U0001f642 {{ 7 * 7 }}"}]


@pytest.fixture(scope="module")
def shared():
    """One for the tests after which it goes on."""
    child = TemplateProcess()
    yield child
    child.close()


@pytest.fixture
def child():
    child = TemplateProcess()
    yield child
    child.close()


def test_it_renders_as_render_chat_does_again_and_again(shared):
    for template in (TEMPLATE, "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}", "one"):
        assert shared.render(template, HI, TEXT) == render_chat(template, HI, TEXT)
    assert shared.process.poll() is None


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('no such role') }}", "no such role"), ("{% if %}", "cannot render"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ 1 // 0 }}", "division"), ("{{ 'x' * 2 ** 40 }}", "Memory"),
    ("{{ 'x' * 2 ** 22 }}", "more than 2097152 bytes"), ("{{ '\\ud800' }}", "surrogates")])
def test_a_template_that_fails_says_why_and_the_next_chat_is_rendered(shared, template, says):
    with pytest.raises(ValueError, match=says):
        shared.render(template, HI, TEXT)
    assert shared.render("{{ messages[0].role }}", HI, TEXT) == "user"


def test_one_that_goes_on_and_on_is_ended_and_the_next_chat_has_another():
    child = TemplateProcess(seconds=0.2)
    try:
        assert child.render(LOOP, HI, TEXT)
        first = child.process
        with pytest.raises(ValueError, match="more than 0.2 s"):
            child.render(LOOP, [{"role": "loop", "content": ""}], TEXT)
        assert first.returncode == -signal.SIGPROF
        assert child.render(LOOP, HI, TEXT) and child.process.pid != first.pid
    finally:
        child.close()


def test_one_that_uses_no_time_is_ended_by_the_clock(child, monkeypatch):
    child.render("", HI, TEXT)
    monkeypatch.setattr(chat_templates, "PATIENCE", 0.2)
    os.kill(child.process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="more than"):
        child.render("", HI, TEXT)
    monkeypatch.undo()
    assert child.render("one", HI, TEXT) == "one"


def test_one_that_was_killed_between_two_chats_costs_no_chat(child):
    child.render("", HI, TEXT)
    child.process.kill()
    child.process.wait()
    assert child.render("one", HI, TEXT) == "one"


def test_the_child_leaves_signals_to_the_server_and_ends_with_close(child):
    child.render("", HI, TEXT)
    process = child.process
    for sign in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(sign)
    assert child.render("one", HI, TEXT) == "one" and child.process is process
    child.close()
    assert process.returncode == -signal.SIGKILL and process.pid not in children(os.getpid())


def test_the_child_dies_with_its_server():
    code = ("from nanoinfra.serve.server.openai.chat_templates import TemplateProcess\n"
            "from nanoinfra.model.tokenizer import Text\n"
            "child = TemplateProcess()\nchild.render('', [], Text(None))\n"
            "print(child.process.pid, flush=True)\ninput()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as server:
        pid = int(server.stdout.readline())
        server.kill()
        server.wait()
        until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_the_child_does_without_torch_and_unpickles_nothing():
    code = ("import pickle, sys\nimport nanoinfra.serve.server.openai.chat_templates as t\n"
            "assert 'torch' not in sys.modules\n"
            "t.without_torch()\nt.renderer()\npickle.loads = pickle.Unpickler = None\n"
            "said = t.answer('{{ messages }}{{ pad_token }}', [], {'pad_token': 'p'})\n"
            "assert said == b'{\"text\": \"[]p\"}'\n"
            "peak = int(open('/proc/self/status').read().split('VmPeak:')[1].split()[0]) * 1024\n"
            "assert sys.modules['torch'] is None and 4 * peak < t.MEMORY, peak")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_the_hub_extra_a_chat_is_refused_in_one_line():
    code = ("import sys\nsys.modules['transformers'] = None\n"
            "import nanoinfra.serve.server.openai.chat_templates as t\n"
            "print(t.answer('{{ messages }}', [], {}).decode())")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == ('{"error": "chat templates need the package transformers; '
                                   'pip install \'nanoinfra[hub]\'"}')
