"""Chat templates, as models come with or as mean harm, times twelve lists of messages.

Equal means: the text that transformers' apply_chat_template makes of them.
"""
import json
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from nanoinfra.model.tokenizer import apply_chat_template
from nanoinfra.model.weights.load_model import load_model
from nanoinfra.serve.server.openai.chat_template_process import ChatTemplateProcess
from tests.model.foreign.judge import Case, Fault, Refused, ours, same
from tests.model.foreign.kinds import write_text
from tests.model.foreign.models import raw, write_model
from tests.model.foreign.texts import ASKED

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀 <b>&\"'\n"}
ANSWER = {"role": "assistant", "content": " Hello. "}
ADD = {"name": "add", "arguments": {"b": 2, "a": "é<"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_12345", "type": "function", "function": ADD}],
}
TOOL = {"role": "tool", "content": "3", "tool_call_id": "call_12345", "name": "add"}
THOUGHT = {"role": "assistant", "content": "<think>a</think>\n\nb", "reasoning_content": "r", "extra": 1.5}
MESSAGES = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER],
    "all": [SYSTEM, USER, ANSWER, USER],
    "ends in assistant": [USER, ANSWER],
    "two users": [USER, USER],
    "assistant first": [ANSWER, USER],
    "system last": [USER, SYSTEM],
    "tool": [USER, CALL, TOOL],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
    "strange": [{"role": "other", "content": "{{ 7 * 7 }} {% raw %}"}, {"role": "user", "content": ""}],
    "thought": [USER, THOUGHT, {"role": "user", "content": "  \n"}],
}
CHAT = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).with_name("chat").iterdir())
}
TEMPLATES = CHAT | {
    "tojson options": "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "literal": "no jinja at all",
    "empty": "",
    "blank": " \n",
    "raises": "{{ raise_exception('no\nthank you') }}",
    "syntax": "{% for m in messages %}{{ m.content }",
    "unknown tag": "{% nonsense %}",
    "unknown filter": "{{ 1 | nope }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "division": "{{ 1 // 0 }}",
    "type error": "{{ 'a' + 1 }}",
    "key error": "{{ messages[0]['x']['y'] }}",
    "do": "{% do messages.append(1) %}",
    "assign": "{% set messages[0].role = 'x' %}",
    "trans": "{% trans %}x{% endtrans %}",
    "append": "{{ messages.append({'role': 'x'}) }}",
    "undefined call": "{{ f(1) }}",
    "recursive": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "surrogate": "{{ '\\ud800' }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
}
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9) | list | length }}",
    "power": "{{ 9**9**9 }}",
    "multiply": "{{ 'a' * 10**10 }}",
    "double": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x "
    "+ ns.x %}{% endfor %}{{ ns.x }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested": "{% if 1 %}" * 500,
    "macro loop": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long": "{{ 1 }}" * 200_000,
    "lipsum": "{{ lipsum(n=10**7) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "format width": "{{ '%10000000000d' % 1 }}",
}


def template_cases() -> list[Case]:
    """Templates times messages; the hostile ones with one message; where templates may lie in a folder."""
    made = [
        _case(f"{name}, {said}", partial(_at, name="chat_template.jinja", text=text), MESSAGES[said])
        for name, text in TEMPLATES.items()
        for said in MESSAGES
    ]
    made += [
        _case(f"hostile {name}", partial(_at, name="chat_template.jinja", text=text), MESSAGES["user"], True)
        for name, text in HOSTILE.items()
    ]
    made += [_case(f"place {name}", change, MESSAGES["all"]) for name, change in PLACES.items()]
    return made


def _case(name, change, messages, hostile=False):
    def make(folder):
        write_model(folder, raw("llama"), build=False)
        write_text(folder, "llama2 fast")
        change(folder)

    return Case(
        f"template {name}",
        make,
        partial(_judge, messages=messages, hostile=hostile),
        partial(_renders_there, messages=messages) if not hostile else False,
    )


def _judge(folder, messages, hostile):
    _, text, template = ours(load_model, folder)
    if template is None:
        return _no_template(folder, messages)
    if hostile:  # transformers would hang: no more than the sandbox's own words
        process = ChatTemplateProcess()
        try:
            ours(process.render_chat_template, template, messages, text)
            return "equal"
        finally:
            process.close()
    try:
        want = _there(folder, messages)
    except Exception as error:
        got = ours(apply_chat_template, template, messages, text)
        raise Fault(f"{got[:100]!r}, where transformers raises {type(error).__name__}: {error}") from error
    same(ours(apply_chat_template, template, messages, text), want, "the prompt")
    return "equal"


def _there(folder, messages):
    other = AutoTokenizer.from_pretrained(folder, **ASKED)
    return other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _renders_there(folder, messages):
    try:
        return isinstance(_there(folder, messages), str)
    except Exception:
        return False


def _no_template(folder, messages):
    if _renders_there(folder, messages):
        raise Fault("no template, where transformers has one")
    raise Refused("the model has no chat template")


def _at(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def _config(value):
    def change(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))

    return change


def _both(folder):
    _config("from config {{ messages | length }}")(folder)
    _at(folder, "chat_template.jinja", "from file {{ messages | length }}")


PLACES = {
    "config": _config(CHAT["chatml"]),
    "both": _both,
    "list": _config(
        [{"name": "default", "template": CHAT["chatml"]}, {"name": "tool_use", "template": "tools"}]
    ),
    "list without default": _config([{"name": "rag", "template": "x"}]),
    "dict": _config({"default": CHAT["chatml"], "other": "x"}),
    "number": _config(7),
    "empty": _config(""),
    "null": _config(None),
    "empty list": _config([]),
    "list of strings": _config(["x"]),
    "list of numbers": _config([1]),
    "true": _config(True),
    "json file": partial(
        _at, name="chat_template.json", text=json.dumps({"chat_template": "json {{ messages[0].role }}"})
    ),
    "additional": partial(_at, name="additional_chat_templates/tool_use.jinja", text="tool"),
    "crlf": partial(_at, name="chat_template.jinja", text="a\r\n{{ messages[0].role }}\r\n"),
    "bom": partial(_at, name="chat_template.jinja", text="\ufeff{{ messages[0].role }}"),
}
