"""langchain-openai against a server: PEER/bin/python with_langchain.py URL MODEL

Tools and structured output are answered, or refused by name: to get neither would be wrong.
"""
import asyncio
import sys
from importlib.metadata import version

import openai
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from report import refusal, report

URL, MODEL = sys.argv[1:]
QUESTION = "What is 2+2? Answer with a number alone."


class Weather(BaseModel):
    """The weather of a city."""
    city: str = Field(description="its name")


def model(**more):
    return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=4,
                      max_retries=0, **more)


def invoke():
    got = model().invoke([("system", "Be brief."), ("user", QUESTION)])
    assert got.usage_metadata["output_tokens"] == 4 and got.response_metadata["finish_reason"] == "length"
    return got.content


def stream():
    chunks = list(model().stream(QUESTION))
    whole = model().invoke(QUESTION).content
    assert "".join(chunk.content for chunk in chunks) == whole
    return f"{len(chunks)} chunks, the same text"


def asynchronous():
    async def ask():
        return await asyncio.gather(*(model().ainvoke(QUESTION) for _ in range(4)))
    assert {each.content for each in asyncio.run(ask())} == {model().invoke(QUESTION).content}
    return "4 at once, the same text"


def batch():
    return " / ".join(each.content for each in model().batch(["Say yes.", "Say no."]))


def log_probabilities():
    found = model(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert len(found) == 4 and all(len(each["top_logprobs"]) == 2 for each in found)
    return f"of {len(found)} tokens"


def responses():
    got = model(use_responses_api=True).invoke(QUESTION)
    assert got.text == model().invoke(QUESTION).content and got.usage_metadata["output_tokens"] == 4
    return got.text


def responses_streamed():
    text = "".join(chunk.text for chunk in model(use_responses_api=True).stream(QUESTION))
    assert text == model().invoke(QUESTION).content
    return "the same text"


def tools():
    return _answered_or_refused(lambda: model().bind_tools([Weather]).invoke(QUESTION), "tools")


def tools_of_responses():
    asked = model(use_responses_api=True).bind_tools([Weather])
    return _answered_or_refused(lambda: asked.invoke(QUESTION), "tools")


def a_tool_that_must_be_called():
    asked = model().bind_tools([Weather], tool_choice="Weather")
    return refusal(lambda: asked.invoke(QUESTION), openai.BadRequestError, "tool_choice", "tools")


def structured_output():
    return _structured("json_schema", "response_format")


def structured_output_by_a_tool():
    return _structured("function_calling", "tool_choice", "tools", "parallel_tool_calls")


def structured_output_as_json():
    return _structured("json_mode", "response_format")


def structured_output_of_responses():
    asked = model(use_responses_api=True).with_structured_output(Weather)
    return refusal(lambda: asked.invoke(QUESTION), openai.BadRequestError, "text.format")


def _structured(method, *says):
    asked = model().with_structured_output(Weather, method=method)
    return refusal(lambda: asked.invoke(QUESTION), openai.BadRequestError, *says)


def _answered_or_refused(call, name):
    try:
        got = call()
    except openai.BadRequestError as error:
        assert name in str(error), error
        return f"refused: {error}"[:200]
    return f"shown to the model, which said: {got.text}"


if __name__ == "__main__":
    sys.exit(report("langchain-openai", version("langchain-openai"), (
        invoke, stream, asynchronous, batch, log_probabilities, responses, responses_streamed, tools,
        tools_of_responses, a_tool_that_must_be_called, structured_output, structured_output_by_a_tool,
        structured_output_as_json, structured_output_of_responses)))
