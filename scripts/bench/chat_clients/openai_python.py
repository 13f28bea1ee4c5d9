"""openai's package for Python against a server: python openai_python.py URL MODEL

Greedy, so that one question has one answer, whichever way it is asked.
"""
import asyncio
import sys

import openai
from report import refusal, report

URL, MODEL = sys.argv[1:]
AI = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
QUESTION = "What is 2+2? Answer with a number alone."
ASKED = {"model": MODEL, "temperature": 0}
CHAT = {**ASKED, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
RESPONSE = {**ASKED, "input": QUESTION, "max_output_tokens": 4}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def models():
    first, = AI.models.list().data
    assert first.id == MODEL == AI.models.retrieve(MODEL).id
    return first.id


def completions():
    asked = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    whole = AI.completions.create(**asked, logprobs=1)
    *parts, last = AI.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    text = "".join(part.choices[0].text for part in parts)
    assert text == whole.choices[0].text and last.usage.completion_tokens == 4
    assert "".join(whole.choices[0].logprobs.tokens) == text
    return text


def chat():
    choice, = AI.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices
    assert choice.finish_reason == "length" and len(choice.logprobs.content) == 4
    return choice.message.content


def chat_streamed():
    chunks = list(AI.chat.completions.create(**CHAT, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat() and chunks[0].choices[0].delta.role == "assistant"
    with AI.chat.completions.stream(**CHAT | {"max_tokens": 60}) as stream:
        assert stream.get_final_completion().choices[0].message.content.startswith(text)
    return f"{len(chunks)} chunks, the same text; by the helper too"


def responses():
    got = AI.responses.create(**RESPONSE, metadata={"a": "b"})
    assert got.output_text == chat() and got.metadata == {"a": "b"}
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert got.usage.output_tokens == 4 and got.usage.total_tokens == got.usage.input_tokens + 4
    return got.output_text


def responses_streamed():
    events = list(AI.responses.create(**RESPONSE, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text == responses()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with AI.responses.stream(**RESPONSE | {"max_output_tokens": 60}) as stream:
        final = stream.until_done().get_final_response()
    assert final.status == "completed" and final.output_text.startswith(deltas)
    return f"{len(events)} events, the same text; by the helper {final.usage.output_tokens} tokens to the end"


def responses_of_several_turns():
    turns = [{"role": "user", "content": QUESTION}]
    first = AI.responses.create(**RESPONSE | {"input": turns})
    turns += [*first.to_dict()["output"], {"role": "user", "content": "And 3+3?"}]
    return AI.responses.create(**RESPONSE | {"input": turns}, instructions="Be brief.").output_text


def asynchronous():
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as ai:
            chats = [ai.chat.completions.create(**CHAT, stream=True) for _ in range(4)]
            said = ["".join([chunk.choices[0].delta.content or "" async for chunk in each if chunk.choices])
                    for each in await asyncio.gather(*chats)]
            whole = [ai.responses.create(**RESPONSE) for _ in range(4)]
            said += [each.output_text for each in await asyncio.gather(*whole)]
            async with ai.responses.stream(**RESPONSE) as stream:
                return [*said, "".join([each.delta async for each in stream if "text.delta" in each.type])]
    said = asyncio.run(ask())
    assert set(said) == {chat()}, said
    return f"{len(said)} at once, the same text"


def given_up():
    stream = AI.responses.create(**RESPONSE | {"max_output_tokens": 400}, stream=True)
    next(iter(stream))
    stream.close()
    return f"a stream closed after its first event; the next answer: {chat()}"


def tools():
    try:
        choice, = AI.chat.completions.create(**CHAT, tools=[WEATHER]).choices
    except openai.BadRequestError as error:
        assert "tools" in str(error)
        return f"refused: {error}"[:200]
    return f"shown to the model, which said: {choice.message.content}"


def an_unknown_model():
    return refusal(lambda: AI.responses.create(**RESPONSE | {"model": "gpt-4"}), openai.NotFoundError, MODEL)


def more_than_the_context():
    try:
        AI.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": "colour " * 20_000}]})
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error.code
        return f"refused: {error}"[:200]
    raise AssertionError("it was not refused")


def a_json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    return refusal(lambda: AI.chat.completions.create(**CHAT, response_format=form),
                   openai.BadRequestError, "response_format")


def an_answer_that_was_stored():
    refusal(lambda: AI.responses.retrieve("resp_1"), openai.NotFoundError, "stored")
    return refusal(lambda: AI.responses.create(**RESPONSE, previous_response_id="resp_1"),
                   openai.BadRequestError, "stored")


def embeddings():
    return refusal(lambda: AI.embeddings.create(model=MODEL, input="a"), openai.APIStatusError, "embeddings")


if __name__ == "__main__":
    sys.exit(report("openai", openai.__version__, (
        models, completions, chat, chat_streamed, responses, responses_streamed, responses_of_several_turns,
        asynchronous, given_up, tools, an_unknown_model, more_than_the_context, a_json_schema,
        an_answer_that_was_stored, embeddings)))
