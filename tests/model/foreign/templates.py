"""Thirty and more chat templates, like those that models come with and like those that want harm, times twelve
lists of messages. Equal means: the text that transformers' apply_chat_template makes of them."""
import json
from functools import partial

from transformers import AutoTokenizer

from nanoinfra.model.load import load
from nanoinfra.model.text import render_chat
from nanoinfra.serve.templates import TemplateProcess
from tests.model.foreign.judge import Case, Fault, Refused, ours, same
from tests.model.foreign.models import raw, write_model
from tests.model.foreign.tokenizers import ASKED, write_text

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀 <b>&\"'\n"}
ANSWER, CALL = {"role": "assistant", "content": " Hello. "}, {"role": "assistant", "content": None, "tool_calls": [
    {"id": "call_12345", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "é<"}}}]}
MESSAGES = {
    "user": [USER], "system": [SYSTEM, USER], "turns": [USER, ANSWER, USER], "all": [SYSTEM, USER, ANSWER, USER],
    "ends in assistant": [USER, ANSWER], "two users": [USER, USER], "assistant first": [ANSWER, USER],
    "system last": [USER, SYSTEM], "tool": [USER, CALL, {"role": "tool", "content": "3", "tool_call_id": "call_12345",
                                                          "name": "add"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
    "strange": [{"role": "other", "content": "{{ 7 * 7 }} {% raw %}"}, {"role": "user", "content": ""}],
    "thought": [USER, {"role": "assistant", "content": "<think>a</think>\n\nb", "reasoning_content": "r", "extra": 1.5},
                {"role": "user", "content": "  \n"}],
}
TURNS = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles "
         "must alternate') }}{% endif %}")
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "qwen2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>"
             "system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML.partition("%}")[2],
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]["
              "'content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for m in "
              "loop_messages %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + "
              "'\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] "
              "== 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
              "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>'"
              " + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if "
              "loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if "
              "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3.1": "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
                "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n        {%- set date_string"
                " = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n        {%- set date_string = \"26 Jul 2024\" %}\n"
                "    {%- endif %}\n{%- endif %}\n{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif "
                "%}\n{{- date_string }}\n{%- for m in messages %}\n{{- m.role + ': ' }}{{ m.content }}\n{%- endfor %}",
    "mistral": "{{ bos_token }}" + TURNS + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% "
               "else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral tools": "{%- if messages[0][\"role\"] == \"system\" %}{%- set system_message = messages[0][\"content\"] %}"
                     "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
                     "{%- set user_messages = loop_messages | selectattr(\"role\", \"equalto\", \"user\") | list %}{%- "
                     "set ns = namespace() %}{%- set ns.index = 0 %}{%- for m in loop_messages %}{%- if m.tool_calls is "
                     "defined and m.tool_calls is not none %}{{- \"[TOOL_CALLS] [\" }}{%- for t in m.tool_calls %}{%- set "
                     "out = t.function|tojson %}{{- out[:-1] }}{{- ', \"id\": \"' + t.id + '\"}' }}{%- endfor %}]{%- else "
                     "%}{%- set ns.index = ns.index + 1 %}{{ ns.index }}{{ m.content }}{%- endif %}{%- endfor %}",
    "phi3": "{% for m in messages %}{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + '<|end|>\n'}}{% elif "
            "m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'assistant' %}{{'<|"
            "assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|"
            "assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
              "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token "
              "}}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}"
              "\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% "
              "endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% "
             "endif %}{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set "
             "role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' "
             "}}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "deepseek": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns "
                "= namespace(is_first=false, system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}{% set "
                "ns.system = m['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}{%- for m in messages %}{%- "
                "if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{%- endif %}{%- if m['role'] == 'assistant' and "
                "m['content'] is not none %}{% set content = m['content'] %}{% if '</think>' in content %}{% set content "
                "= content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- "
                "endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}",
    "qwen3": "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}{%- for message in messages[::-1] "
             "%}{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == "
             "\"user\" and message.content is string and not(message.content.startswith('<tool_response>') and "
             "message.content.endswith('</tool_response>')) %}{%- set ns.multi_step_tool = false %}{%- set ns.last = "
             "index %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.content is string %}{%- set content = "
             "m.content %}{%- else %}{%- set content = '' %}{%- endif %}{%- if m.reasoning_content is string %}{{- "
             "m.reasoning_content.strip('\\n') }}{%- endif %}{{- '<|im_start|>' + m.role + '\\n' + content.lstrip('\\n') "
             "}}{%- if m.tool_calls %}{%- for call in m.tool_calls %}{{- call.function.arguments | tojson }}{%- endfor %}"
             "{%- endif %}{%- endfor %}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}"
             "{%- endif %}{{- ns.last }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
                  "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if "
                     "loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "macro": "{% macro show(m, tag='x') -%}<{{ tag }}>{{ m.content }}{{ caller() if caller }}</{{ tag }}>{%- endmacro %}{% "
             "for m in messages %}{{ show(m, tag=m.role) }}{% call show(m) %}!{% endcall %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson }}",
    "tojson options": "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "whitespace": "  {%- for m in messages -%}\n  {{ m.role }} \n {%- endfor +%}\n  {%+ if true %} x {% endif %}\n\n",
    "trimmed": "{% for m in messages %}\n    {% if m.role %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}\n",
    "undefined": "{{ nothing }}{{ messages[9] }}{{ tools }}{{ documents }}{% if tools %}t{% endif %}{{ tools is none }}",
    "specials": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ cls_token }}|{{ "
                "additional_special_tokens }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(',') | upper }}{{ messages | length }}{{ messages[0].content | "
               "replace('H', 'J') | title | escape }}{{ [3,1,2] | sort | reverse | list }}{{ 'a' ~ 1 }}{{ 7 // 2 }}{{ '%s' "
               "% 3 }}{{ messages | rejectattr('role', 'eq', 'user') | list | count }}{{ 'x' | center(5) }}{{ 3.0 }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{{ m.get('name', '-') }}{% "
             "endfor %}{{ dict(a=1) }}{{ range(3) | list }}{{ cycler('a', 'b').next() }}{{ lipsum is defined }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if "
             "p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "tests": "{% for m in messages %}{{ m is mapping }}{{ m.content is iterable }}{{ m.content is none }}{{ m.x is "
             "defined }}{% endfor %}{{ 'a' in ['a'] }}{{ none }}{{ True }}{{ true and not false }}",
    "literal": "no jinja at all", "empty": "", "blank": " \n", "raises": "{{ raise_exception('no\nthank you') }}",
    "syntax": "{% for m in messages %}{{ m.content }", "unknown tag": "{% nonsense %}", "unknown filter": "{{ 1 | nope }}",
    "include": "{% include '/etc/passwd' %}", "import": "{% import 'x' as y %}", "extends": "{% extends 'x' %}",
    "division": "{{ 1 // 0 }}", "type error": "{{ 'a' + 1 }}", "key error": "{{ messages[0]['x']['y'] }}",
    "do": "{% do messages.append(1) %}", "assign": "{% set messages[0].role = 'x' %}", "trans": "{% trans %}x{% endtrans %}",
    "append": "{{ messages.append({'role': 'x'}) }}", "undefined call": "{{ f(1) }}", "recursive": "{% for m in messages "
    "recursive %}{{ loop(messages) }}{% endfor %}", "surrogate": "{{ '\\ud800' }}", "format": "{{ '{0.__class__}'.format(1) }}",
}
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "globals": "{{ raise_exception.__globals__ }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "loop": "{% for i in range(99999) %}{% for j in "
    "range(99999) %}{% endfor %}{% endfor %}", "range": "{{ range(10**9) | list | length }}", "power": "{{ 9**9**9 }}",
    "multiply": "{{ 'a' * 10**10 }}", "double": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x "
    "+ ns.x %}{% endfor %}{{ ns.x }}", "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested": "{% if 1 %}" * 500,
    "macro loop": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "long": "{{ 1 }}" * 200_000,
    "lipsum": "{{ lipsum(n=10**7) }}", "center": "{{ 'x' | center(10**10) }}", "format width": "{{ '%10000000000d' % 1 }}",
}


def template_cases() -> list[Case]:
    """Templates times messages; the hostile ones with one message; where templates may lie in a folder."""
    made = [_case(f"{name}, {said}", partial(_at, name="chat_template.jinja", text=text), MESSAGES[said])
            for name, text in TEMPLATES.items() for said in MESSAGES]
    made += [_case(f"hostile {name}", partial(_at, name="chat_template.jinja", text=text), MESSAGES["user"], True)
             for name, text in HOSTILE.items()]
    made += [_case(f"place {name}", change, MESSAGES["all"]) for name, change in PLACES.items()]
    return made


def _case(name, change, messages, hostile=False):
    def make(folder):
        write_model(folder, raw("llama"), build=False)
        write_text(folder, "llama2 fast")
        change(folder)
    return Case(f"template {name}", make, partial(_judge, messages=messages, hostile=hostile),
                partial(_renders_there, messages=messages) if not hostile else False)


def _judge(folder, messages, hostile):
    _, text, template = ours(load, folder)
    if template is None:
        return _no_template(folder, messages)
    if hostile:                              # transformers would hang: no more than the sandbox's own words
        process = TemplateProcess()
        try:
            ours(process.render, template, messages, text)
            return "equal"
        finally:
            process.close()
    try:
        want = _there(folder, messages)
    except Exception as error:
        got = ours(render_chat, template, messages, text)
        raise Fault(f"{got[:100]!r}, where transformers raises {type(error).__name__}: {error}") from error
    same(ours(render_chat, template, messages, text), want, "the prompt")
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
    "config": _config(CHATML), "both": _both, "list": _config([{"name": "default", "template": CHATML}, {
        "name": "tool_use", "template": "tools"}]), "list without default": _config([{"name": "rag", "template": "x"}]),
    "dict": _config({"default": CHATML, "other": "x"}), "number": _config(7), "empty": _config(""), "null": _config(None),
    "empty list": _config([]), "list of strings": _config(["x"]), "list of numbers": _config([1]), "true": _config(True),
    "json file": partial(_at, name="chat_template.json", text=json.dumps({"chat_template": "json {{ messages[0].role }}"})),
    "additional": partial(_at, name="additional_chat_templates/tool_use.jinja", text="tool"), "crlf": partial(
        _at, name="chat_template.jinja", text="a\r\n{{ messages[0].role }}\r\n"), "bom": partial(
        _at, name="chat_template.jinja", text="\ufeff{{ messages[0].role }}"),
}
