"""What one does with the page of the server, in a browser: ask, and look at what was said."""
import json
import socket
from contextlib import ExitStack, contextmanager

from tests.serve.browser import named
from tests.serve.host import until

# The chat's own server, for a test that wants an error, or each piece of an answer at its time.
STUB = """
const real = fetch, bytes = text => new TextEncoder().encode(text)
window.fetch = (path, options) => {
  if (path == "stats") return real(path, options)
  window.asked = JSON.parse(options.body)
  const answer = window.refusal ?? (() => new Response(new ReadableStream({ start(stream) {
    window.stream = stream
    options.signal.addEventListener("abort", () => stream.error(options.signal.reason))
  } })))
  window.refusal = null
  return Promise.resolve().then(answer)
}
window.send = news => stream.enqueue(bytes("data: " + JSON.stringify(news) + "\\n\\n"))
window.say = text => send({ choices: [{ delta: { content: text }, finish_reason: null }] })
window.end = () => { stream.enqueue(bytes("data: [DONE]\\n\\n")); stream.close() }
0"""


def text(page, name):
    """Of the element of this id; None while there is no such."""
    return page.run(f"{named(name)}?.textContent")


def box(page):
    return page.run("document.getElementById('prompt').value")


def turns(page):
    """What was said, in turn."""
    return page.run("[...document.querySelectorAll('.turn')].map(turn => turn.firstChild.textContent)")


def told(page):
    """The questions and answers that the model was told by the last request."""
    return [message["content"] for message in page.run("asked.messages")]


def begun(page):
    """Wait until STUB was asked, and can say something."""
    until(lambda: page.run("window.stream != undefined"))


def wait_for_word(page):
    until(lambda: len((turns(page) or [""])[-1]) > 5)


def answered(page, words, tokens=40):
    """Ask, and wait for the answer's end."""
    page.run(f"{named('tokens')}.value = {tokens}; {named('prompt')}.focus()")
    page.type(words)
    page.enter()
    until(lambda: text(page, "send") == "Send")
    return page.run("document.getElementById('turns').lastChild.textContent")


@contextmanager
def streams(client, count):
    """So many requests that are being answered, of two kinds that begin alike."""
    with ExitStack() as stack:
        for i in range(count):
            prompt = "a long beginning " * 2 + f"of {i % 2}"
            body = json.dumps({"prompt": prompt, "max_tokens": 9999, "stream": True})
            wire = stack.enter_context(socket.create_connection(("127.0.0.1", client.base_url.port)))
            head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                    f"Content-Length: {len(body)}")
            wire.sendall("\r\n".join((*head, "", body)).encode())
        yield
