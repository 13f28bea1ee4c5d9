"""curl against a server, as examples show it: python with_curl.py URL MODEL"""
import json
import subprocess
import sys

from report import report

URL, MODEL = sys.argv[1:]
QUESTION = "What is 2+2? Answer with a number alone."
ASKED = {"model": MODEL, "temperature": 0}
CHAT = {**ASKED, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
RESPONSE = {**ASKED, "input": QUESTION, "max_output_tokens": 4}


def curl(path, body):
    command = ["curl", "-sSN", f"{URL}/v1/{path}", "-H", "Content-Type: application/json", "-H",
               "Authorization: Bearer none", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def chat():
    return json.loads(curl("chat/completions", CHAT))["choices"][0]["message"]["content"]


def chat_streamed():
    *lines, done = filter(None, curl("chat/completions", {**CHAT, "stream": True}).splitlines())
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == chat()
    assert done == "data: [DONE]"
    return f"{len(chunks)} chunks, the same text"


def responses():
    part, = json.loads(curl("responses", RESPONSE))["output"][0]["content"]
    assert part["text"] == chat()
    return part["text"]


def responses_streamed():
    whole = curl("responses", {**RESPONSE, "stream": True})
    events = [event.split("\n") for event in whole.split("\n\n")[:-1]]
    said = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [named for named, _ in events] == [f"event: {each['type']}" for each in said]
    assert "".join(each["delta"] for each in said if each["type"] == "response.output_text.delta") == chat()
    return f"{len(said)} events, the same text"


if __name__ == "__main__":
    said = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    sys.exit(report("curl", said.split()[1], (chat, chat_streamed, responses, responses_streamed)))
