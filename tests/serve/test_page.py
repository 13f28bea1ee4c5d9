"""The page, used in a real browser where there is one: it chats, and shows the scheduler at work.

What the server says is the fake engine's, which repeats all that it was told; or the test's own (STUB), where
an error is wanted or each piece at its time.
"""
import json
import os
import re
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nanoinfra.serve.server import fastapi_app as serve
from nanoinfra.serve.server.fastapi_app import _PAGE, _PAGE_FILES
from nanoinfra.serve.server.http.access_control import AccessPolicy
from tests.serve.browser import CHROMIUM, SHIFT, named, started
from tests.serve.chatting import STUB, answered, begun, box, streams, text, told, turns, wait_for_word
from tests.serve.fake import Idle
from tests.serve.host import ROOT, metric, serving, until

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
REFUSALS = [                                 # how the server answers, and what the page says then
    (429, {"type": "rate_limit_error", "message": "9 wait"}, "the server has too much to do; 9 wait"),
    (503, {"type": "service_unavailable_error", "message": "it loads"}, "server cannot answer now: it loads"),
    (400, {"code": "context_length_exceeded", "message": "it is long"}, "it is long. Ask for fewer tokens"),
    (400, {"type": "invalid_request_error", "message": "top_k is odd"}, "No answer: top_k is odd"),
    (500, {"type": "server_error", "message": "the log says more"}, "No answer: the log says more"),
    (502, None, "the answer was HTTP 502"),
    (None, None, "the server cannot be reached")]
UNREACHABLE = "Promise.reject(new TypeError('failed to fetch'))"
BREAKS = [                                   # how a stream ends too soon
    ("stream.error(new TypeError('network error'))", "the connection broke"),
    ("stream.close()", "the server has ended the connection"),
    ("send({ error: { type: 'server_error', message: 'it died' } })", "It breaks off here: it died. Your")]
TOO_WIDE = """[...document.querySelectorAll("body, body *")].filter(each => each.checkVisibility()
    && each.getBoundingClientRect().right > 360).map(each => each.id || each.className || each.tagName)"""
FRAMES = "new Promise(seen => requestAnimationFrame(() => requestAnimationFrame(seen))).then(() => 0)"
AT = "document.getElementById('turns').scrollTop"
AT_END = "(log => log.scrollHeight - log.scrollTop - log.clientHeight < 2)(document.getElementById('turns'))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with started(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served():
    """(client, server), whose answers last longer than any test where 9999 tokens are asked for."""
    with serving(pause=0.02, blocks=9000, max_num_seqs=16, max_num_batched_tokens=256,
                 context=20_000) as both:
        yield both


@pytest.fixture(scope="module")
def tab(browser):
    """One for all tests: a new one costs a CPU second."""
    with browser.tab("about:blank") as tab:
        yield tab


@pytest.fixture
def page(tab, served):
    """It shows that the server is ready, and nothing was said yet. No script of it may fail."""
    tab.open(str(served[0].base_url))
    tab.resize(1280)
    until(lambda: text(tab, "state") == "ready")
    yield tab
    tab.run("document.getElementById('clear').click(); document.getElementById('key').value = ''")
    thrown, tab.errors, tab.thrown = tab.thrown, [], []
    assert not thrown


@needs_chromium
def test_the_page_chats_and_shows_the_scheduler(page, served):
    """Twelve streams beside the chat: they are all in the batch, and what they share is seen."""
    with streams(served[0], 12):
        until(lambda: page.run("document.querySelectorAll('.run').length") == 12)
        answer = answered(page, "<b>you</b> there")
        assert answer.startswith("u:<b>you</b> there\nu:<b>you</b> there"), answer     # text, not markup
        assert "19 tokens in, 0 of them known" in answer and "40 out, cut off there" in answer
        assert "16 of them known" in answered(page, "and?")
        until(lambda: int(text(page, "speed")) > 0 and text(page, "running") == "12")
        assert int(text(page, "shared").removesuffix(" shared")) > 0
        assert text(page, "hits").endswith("%") and "blocks of 8 tokens held" in text(page, "pool")
        if folder := os.environ.get("PICTURES"):
            Path(folder, "page.png").write_bytes(page.picture())
    until(lambda: text(page, "step") == "nobody")
    assert "context of 20000" in answered(page, "too much", 99_999)
    assert page.run("document.querySelectorAll('.error').length") == 1
    assert all("400 (Bad Request)" in str(error) for error in page.errors), page.errors


@needs_chromium
def test_stop_frees_what_the_answer_held_and_keeps_what_was_said(page, served):
    page.run(f"{named('tokens')}.value = 9999")
    page.type("a long story")
    page.enter()
    wait_for_word(page)
    page.click("send")
    until(lambda: text(page, "send") == "Send" and not served[1].engine_client.streams)
    assert page.run("document.querySelectorAll('.error').length") == 0 and box(page) == ""
    said = turns(page)[1]
    assert answered(page, "go on", 100).startswith(f"u:a long story\na:{said}\nu:go on\n")


@needs_chromium
def test_new_while_it_answers_begins_another_conversation(page, served):
    page.run(f"{named('tokens')}.value = 9999")
    page.type("the first")
    page.enter()
    wait_for_word(page)
    page.click("clear")
    assert turns(page) == [] and text(page, "send") == "Send" and box(page) == ""
    until(lambda: not served[1].engine_client.streams)
    assert answered(page, "the second").startswith("u:the second\nu:the second")
    assert turns(page)[0] == "the second" and len(turns(page)) == 2


@needs_chromium
def test_who_reads_above_is_not_moved_until_the_end_is_in_sight_again(page):
    page.run(STUB)
    page.type("a question")
    page.enter()
    begun(page)
    page.run("say('a line\\n'.repeat(200))")
    until(lambda: page.run(f"{AT} > 1000 && {AT_END}"))
    page.scroll("turns", -500)
    until(lambda: not page.run(AT_END))
    page.run(f"(async () => {{ for (let at; at != {AT};) {{ at = {AT}; await {FRAMES} }} }})()")  # it glides
    at = page.run(AT)
    page.run("say('more\\n'.repeat(50))")
    until(lambda: turns(page)[1].endswith("more\n"))
    page.run(FRAMES)
    assert page.run(AT) == at
    page.scroll("turns", 9999)
    until(lambda: page.run(AT_END))
    page.run("say('and more\\n'.repeat(50))")
    until(lambda: turns(page)[1].endswith("and more\n") and page.run(AT_END) and page.run(AT) > at + 2000)


@needs_chromium
def test_a_question_that_was_refused_is_back_in_the_box(page):
    """Enter asks it again, as if it had never been asked; the box keeps what else was written meanwhile."""
    page.run(STUB)
    page.type("why?")
    for status, error, words in REFUSALS:
        body = json.dumps({"error": error}) if error else "<h1>Bad gateway</h1>"
        answer = f"new Response({json.dumps(body)}, {{ status: {status} }})" if status else UNREACHABLE
        page.run(f"refusal = () => {answer}; 0")
        page.enter()
        until(lambda words=words: words in text(page, "turns"))
        assert box(page) == "why?" and text(page, "send") == "Send" and told(page) == ["why?"]
        assert turns(page) == [""] and text(page, "turns").endswith("Your question is back in the box.")
    page.enter()
    until(lambda: text(page, "send") == "Stop" and turns(page) == ["why?", ""])
    page.type("and how?")
    page.click("send")
    until(lambda: box(page) == "why?\n\nand how?" and turns(page) == [])


@needs_chromium
def test_an_answer_that_breaks_off_stays_to_be_read(page):
    """And its question is in the box; the model is told of neither."""
    page.run(STUB)
    page.type("why?")
    for i, (how, words) in enumerate(BREAKS, 1):
        page.run("window.stream = undefined")
        page.enter()
        begun(page)
        assert told(page) == ["why?"] and box(page) == "" and text(page, "send") == "Stop"
        page.run("say('because')")
        until(lambda i=i: turns(page) == ["why?", "because"] * i)
        page.run(how)
        until(lambda words=words: words in text(page, "turns"))
        assert turns(page) == ["why?", "because"] * i and box(page) == "why?" and text(page, "send") == "Send"
    assert page.run("document.querySelectorAll('.broken').length") == 2 * len(BREAKS)


@needs_chromium
def test_the_keyboard_and_the_mouse_ask_once(page):
    """Shift+Enter is a line, an input method's Enter a word; nothing is asked twice, or while it answers."""
    page.run(STUB)
    page.enter()
    page.type(" ")
    page.enter()
    page.click("send", 2)
    assert turns(page) == []
    page.run(f"{named('prompt')}.value = ''; {named('prompt')}.focus()")
    page.type("a")
    page.enter(SHIFT)
    page.call("Input.imeSetComposition", text="か", selectionStart=1, selectionEnd=1)
    page.press("keyDown")                                    # a real input method takes the key itself
    page.type("か")
    page.press("keyUp")
    assert turns(page) == [] and box(page).startswith("a\nか")
    page.run(f"{named('prompt')}.value = 'a\\nか'")
    page.click("send", 2)
    begun(page)
    assert text(page, "send") == "Stop" and turns(page) == told(page) + [""] == ["a\nか", ""]
    page.run(f"{named('prompt')}.focus()")
    page.type("next")
    page.enter()
    assert box(page) == "next" and text(page, "send") == "Stop"
    page.run("say('b'); end()")
    until(lambda: text(page, "send") == "Send")
    page.enter()
    until(lambda: turns(page) == ["a\nか", "b", "next", ""])
    assert told(page) == ["a\nか", "b", "next"]


@needs_chromium
def test_a_long_answer_is_written_once(page):
    """2,000 tokens add 2,000 tokens to the page, and what of it was selected stays selected."""
    page.run(STUB)
    page.run("""new MutationObserver(all => { for (const one of all) { for (const node of one.addedNodes)
        window.written += node.data?.length ?? 0 } }).observe(document.getElementById("turns"),
        { childList: true, characterData: true, subtree: true }); window.written = 0""")
    page.type("tell")
    page.enter()
    begun(page)
    page.run("say('begin')")
    until(lambda: turns(page)[1] == "begin")
    page.run("getSelection().selectAllChildren(document.querySelectorAll('.turn')[1].firstChild)")
    page.run("(async () => { for (let i = 0; i < 2000; i++) { say(' token'); await 0 } end() })()")
    until(lambda: text(page, "send") == "Send")
    assert page.run("[getSelection().toString(), written]") == ["begin", 5 + 2000 * 6]
    assert len(turns(page)[1]) == 5 + 2000 * 6


@needs_chromium
def test_a_server_that_is_gone_is_missed_and_found_again(page):
    stale = "document.querySelector('.stale, #state:not(.ready)') != null"
    with serving(worker=Idle()) as (client, server):
        page.open(str(client.base_url))
        until(lambda: text(page, "state") == "ready" and not page.run(stale))
        server.handle_exit(15, None)
    until(lambda: text(page, "state") == "the server cannot be reached; trying again" and page.run(stale))
    assert "the server cannot be reached" in answered(page, "are you there?")
    assert box(page) == "are you there?"
    with serving(port=client.base_url.port, worker=Idle()) as (_, server):
        until(lambda: text(page, "state") == "ready" and not page.run(stale))
        server.handle_exit(15, None)
    assert box(page) == "are you there?"


@needs_chromium
@pytest.mark.prove
def test_a_server_that_says_nothing_or_shows_nothing_is_asked_again(page, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(serve, "_STATS_INTERVAL_SECONDS", 600)
        until(lambda: text(page, "state") == "the server says nothing; trying again")
    until(lambda: text(page, "state") == "ready")
    with monkeypatch.context() as patch:
        patch.setattr(serve, "_MAX_STATS_STREAMS", 0)
        page.call("Page.reload")
        until(lambda: text(page, "state") == "0 watch already; close one of their pages; trying again")
        assert answered(page, "still?").startswith("u:still?\n")
    until(lambda: text(page, "state") == "ready")


@needs_chromium
def test_two_tabs_share_nothing_and_a_hidden_one_no_connection(page, browser, served):
    client, server = served
    page.run(f"{named('tokens')}.value = 9999; {named('key')}.value = 'secret'")
    page.type("from a")
    page.enter()
    with browser.tab(str(client.base_url)) as other:
        assert turns(other) == [] and other.run(f"{named('key')}.value") == ""
        assert answered(other, "from b").startswith("u:from b\nu:from b") and len(turns(other)) == 2
        until(lambda: server.app_state.num_stats_streams == 1)  # a browser has six connections to a server
        page.call("Page.bringToFront")
        until(lambda: page.run("!document.hidden") and text(page, "state") == "ready")
        wait_for_word(page)
        assert turns(page)[0] == "from a" and turns(page)[1].startswith("u:from a\nu:from a")


@needs_chromium
def test_a_key_is_asked_for_and_a_reload_keeps_it_and_the_conversation(page, served, monkeypatch):
    monkeypatch.setitem(served[1].app_state._state, "access_policy", AccessPolicy(("clé",)))
    assert page.run("!document.getElementById('key').checkVisibility()")
    for key, words in (("", "a key is needed; give it below"), ("wrong", "this key is not right")):
        page.run(f"{named('key')}.value = {key!r}")
        answered(page, "" if box(page) else "open")
        until(lambda words=words: words in text(page, "turns"))
        assert page.run("document.activeElement.id") == "key" and box(page) == "open"
    page.run(f"{named('key')}.value = ''")
    page.type("clé")
    page.enter()                                             # in the field of the key
    until(lambda: len(turns(page)) == 2 and text(page, "send") == "Send")
    said = turns(page)
    assert said[1].startswith("u:open\nu:open")
    page.call("Page.reload")
    until(lambda: page.run("document.readyState == 'complete'") and turns(page) == said)
    assert page.run("[localStorage.length, document.cookie]") == [0, ""]
    assert answered(page, "more", 80).startswith(f"u:open\na:{said[1]}\nu:more\n")


@needs_chromium
@pytest.mark.prove
def test_a_model_without_a_chat_template_goes_on_with_the_text(page, served, monkeypatch):
    monkeypatch.setattr(served[1].engine_client, "engine_ready",
                        replace(served[1].engine_client.engine_ready,
                                chat_template=None))
    until(lambda: "goes on with your text" in page.run("document.getElementById('prompt').placeholder"))
    assert answered(page, "ab\n", 6).startswith("ab\nab\n")
    assert answered(page, "cd", 5).startswith("ab\nab")
    assert turns(page) == ["ab\n", "ab\nab\n", "cd", "ab\nab"]


@needs_chromium
def test_nothing_is_wider_than_a_phone(page, served, monkeypatch):
    """Long words, code, a long name of the model, and a batch of a thousand."""
    client, server = served
    page.resize(360, 740)
    page.run(STUB)
    page.type("x" * 300)
    page.enter()
    begun(page)
    page.run("say('y'.repeat(300) + '\\n    def f(' + 'argument, '.repeat(40) + '):\\n\\treturn'); end()")
    until(lambda: text(page, "send") == "Send")
    run = {"request": "cmpl-0123456789", "index": 3, "computed": 11111, "tokens": 22222, "new": 256, "hit": 9}
    monkeypatch.setitem(server.app_state._state, "served_model_name", "/home/somebody/" + "m" * 200)
    monkeypatch.setattr(server.engine_client, "stats", {
        "running": 1000, "waiting": 100_000, "preemptions": 1_000_000, "batch": [run] * 1000,
        "blocks": 1_000_000, "blocks_used": 999_999, "blocks_shared": 9, "blocks_known": 7, "block_size": 8,
        "prefix_queries": 3, "prefix_hits": 1, "generation_tokens": 0, "prompt_tokens": 0})
    until(lambda: text(page, "more") == "and 936 more" and text(page, "running") == "1000")
    assert "    def f(" in turns(page)[1] and page.run("document.querySelectorAll('.run').length") == 64
    assert text(page, "own") == "999990 by one" and text(page, "free") == "1 free"
    assert page.run(TOO_WIDE) == []


@needs_chromium
def test_every_field_has_a_name_and_errors_are_read_out(page):
    page.run(STUB)
    page.run(f"refusal = () => {UNREACHABLE}; 0")
    page.type("why?")
    page.enter()
    until(lambda: "cannot be reached" in text(page, "turns"))
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    names = {(node["role"]["value"], node["name"]["value"].strip()) for node in nodes if node.get("name")}
    assert {("textbox", "Your question"), ("spinbutton", "temperature"), ("spinbutton", "tokens"),
            ("button", "New"), ("button", "Send"), ("log", "Conversation"), ("article", "The model")} <= names
    assert {"alert", "status"} <= {node["role"]["value"] for node in nodes}


POST = """fetch("{url}/v1/completions", {{
    method: "POST", mode: "{mode}", headers: {{"Content-Type": "{kind}"}},
    body: '{{"prompt": "ab", "max_tokens": 2}}'}}).then(got => got.text(), error => "" + error)"""


@needs_chromium
@pytest.mark.prove
@pytest.mark.parametrize("origins", [(), ("*",)])
def test_the_page_of_another_site_asks_in_vain_unless_it_is_named(tmp_path, origins):
    """First under a name of its own that was rebound to this machine, then at the server's address."""
    with serving(access=AccessPolicy(allowed_origins=origins)) as (client, _):
        url, evil = (f"http://{host}:{client.base_url.port}" for host in ("127.0.0.1", "evil.example"))
        with started(tmp_path, "--host-resolver-rules=MAP evil.example 127.0.0.1") as browser, \
                browser.tab(f"{evil}/") as page:
            assert "evil.example" in page.run("document.body.textContent")
            for address, mode, kind in ((evil, "cors", "application/json"), (url, "no-cors", "text/plain")):
                assert "abab" not in page.run(POST.format(url=address, mode=mode, kind=kind))
            assert metric(client, "prompt_tokens_total") == 0
            got = page.run(POST.format(url=url, mode="cors", kind="application/json"))
            assert ('"text":"ab"' in got) == bool(origins), got
            assert metric(client, "prompt_tokens_total") == (2 if origins else 0)


def test_the_page_needs_nothing_from_elsewhere(served):
    """No address of another host, files beside it alone, no text taken for markup; a header forbids it."""
    client, _ = served
    for path, name in _PAGE_FILES.items():
        source, got = _PAGE.with_name(name).read_text(), client.get(path)
        assert not re.search(r"https?:|@import|url\(|(inner|outer)HTML|insertAdjacent|\.write|eval", source)
        assert {*re.findall(r'(?:src|href|from)[= ]"(?:\./)?(.*?)"', source)} <= {*_PAGE_FILES.values(),
                                                                                  "data:,"}
        assert got.status_code == 200 and got.text == source
        assert got.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in got.headers["content-security-policy"]
        assert re.match("text/(html|css|javascript)|application/javascript", got.headers["content-type"])


def test_what_is_no_python_goes_with_the_package():
    beside = {file.name for file in _PAGE.parent.iterdir() if file.is_file() and file.suffix != ".py"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["nanoinfra.serve.server.page"]
    assert {name for name in beside if any(fnmatch(name, pattern) for pattern in patterns)} == beside
    assert beside >= set(_PAGE_FILES.values())
