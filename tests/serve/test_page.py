"""The page, driven in a real browser where there is one: it chats, and shows the scheduler at work."""
import asyncio
import os
import threading
import tomllib
from pathlib import Path

import pytest

from nanoinfra.serve.access import Access
from nanoinfra.serve.server import PAGE
from tests.serve.browser import CHROMIUM, opened
from tests.serve.host import ROOT, metric, serving, until
from tests.serve.test_load import stream

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SAY = "document.getElementById('prompt').value = {!r}; document.getElementById('form').requestSubmit()"


def text(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def say(page, words):
    page.run(SAY.format(words))
    until(lambda: text(page, "send") == "Send")
    return page.run("document.getElementById('turns').lastChild.textContent")


@needs_chromium
def test_the_page_chats_and_shows_the_scheduler(tmp_path):
    """Twelve streams beside the chat: they are all in the batch, and what they share is seen."""
    async def others():
        await asyncio.gather(*(stream(client, i % 3, 200) for i in range(12)))

    with serving(pause=0.02, blocks=400, seats=16, budget=64) as (client, server), \
            opened(str(client.base_url), tmp_path) as page:
        until(lambda: text(page, "state") == "ready" and text(page, "model") == "fake")
        page.run("document.getElementById('tokens').value = 40")
        load = threading.Thread(target=lambda: asyncio.run(others()))
        load.start()
        until(lambda: page.run("document.querySelectorAll('.run').length") == 12)
        answer = say(page, "<b>you</b> there")
        assert answer.startswith("u:<b>you</b> there\nu:<b>you</b> there"), answer     # text, not markup
        assert "19 tokens in, 0 of them known" in answer and "40 out" in answer
        assert "16 of them known" in say(page, "and?")
        assert int(text(page, "speed")) > 0 and int(text(page, "running")) >= 12
        assert "shared" in text(page, "shared") and text(page, "shared") != "0 shared"
        assert text(page, "hits").endswith("%") and "blocks of 8 tokens held" in text(page, "pool")
        if folder := os.environ.get("PICTURES"):
            Path(folder, "page.png").write_bytes(page.picture())
        load.join()
        until(lambda: text(page, "step") == "nobody")
        page.run("document.getElementById('tokens').value = 9999")
        assert "context of 512" in say(page, "too much")
        assert page.run("document.querySelectorAll('.error').length") == 1
        assert all("400 (Bad Request)" in str(error) for error in page.errors), page.errors


@needs_chromium
def test_stop_frees_what_the_answer_held(tmp_path):
    with serving(pause=0.02) as (client, server), opened(str(client.base_url), tmp_path) as page:
        until(lambda: text(page, "state") == "ready")
        page.run(SAY.format("a long story"))
        until(lambda: page.run("document.getElementById('turns').lastChild.textContent.length") > 5)
        page.run("document.getElementById('form').requestSubmit()")
        until(lambda: text(page, "send") == "Send" and not server.worker.jobs)
        assert page.run("document.querySelectorAll('.error').length") == 0


POST = """fetch("{url}/v1/completions", {{
    method: "POST", mode: "{mode}", headers: {{"Content-Type": "{kind}"}},
    body: '{{"prompt": "ab", "max_tokens": 2}}'}}).then(got => got.text(), error => "" + error)"""


@needs_chromium
@pytest.mark.prove
@pytest.mark.parametrize("origins", [(), ("*",)])
def test_the_page_of_another_site_asks_in_vain_unless_it_is_named(tmp_path, origins):
    """First under a name of its own that was rebound to this machine, then at the server's address."""
    with serving(access=Access(origins=origins)) as (client, _):
        url, evil = (f"http://{host}:{client.base_url.port}" for host in ("127.0.0.1", "evil.example"))
        with opened(f"{evil}/", tmp_path, "--host-resolver-rules=MAP evil.example 127.0.0.1") as page:
            assert "evil.example" in page.run("document.body.textContent")
            for address, mode, kind in ((evil, "cors", "application/json"), (url, "no-cors", "text/plain")):
                assert "abab" not in page.run(POST.format(url=address, mode=mode, kind=kind))
            assert metric(client, "prompt_tokens_total") == 0
            got = page.run(POST.format(url=url, mode="cors", kind="application/json"))
            assert ('"text":"ab"' in got) == bool(origins), got
            assert metric(client, "prompt_tokens_total") == (2 if origins else 0)


def test_the_page_needs_nothing_from_elsewhere():
    """No address of another host, no file beside it; the server's header forbids it too."""
    assert not any(word in PAGE.read_text() for word in ("http:", "https:", "src=", "@import", "url("))
    with serving() as (client, _):
        got = client.get("/")
        assert got.status_code == 200 and got.headers["content-type"].startswith("text/html")
        assert got.headers["content-security-policy"].startswith("default-src 'self'")


def test_what_is_no_python_goes_with_the_package():
    beside = {file.name for file in PAGE.parent.iterdir() if file.is_file() and file.suffix != ".py"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["package-data"]["nanoinfra.serve"]) == beside >= {PAGE.name}
