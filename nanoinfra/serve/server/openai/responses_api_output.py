"""The response of OpenAI's Responses API: one message of text, as one object or as a stream of events.

The stream has the events of OpenAI's server in its order, numbered. At its end the whole text comes again,
in its part, its message and the response object.
"""
import time
from collections.abc import Sequence

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import RequestOutput
from nanoinfra.serve.server.openai.completion_responses import ChatCompletionResponse, encode_json
from nanoinfra.serve.server.openai.responses_api_requests import ResponsesRequest

_STATUS_OF_FINISH_REASON = {"stop": "completed", "length": "incomplete"}
_ERROR_CODE_OF_STATUS = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # others are server_error
_MAX_ECHOED_BYTES_INLINE = 1 << 14           # of repeated request fields; more are encoded in a thread


class ResponsesResponse(ChatCompletionResponse):
    """The response of /v1/responses: one message with one text part."""

    def __init__(self, request: ResponsesRequest, response_id: str, model_name: str, *args):
        super().__init__(request, response_id, model_name, *args)
        self.common_fields = {"id": response_id, "object": "response", "created_at": int(time.time()),
                              "model": model_name}
        self.message_id = "msg_" + response_id.removeprefix("resp_")
        self.num_events = 0                  # in the stream so far
        self.echoed_fields = request.request_fields_to_echo()
        self.echoes_much = len(encode_json(self.echoed_fields)) > _MAX_ECHOED_BYTES_INLINE

    def build_response_object(self, outputs: Sequence[RequestOutput] = ()) -> dict:
        """The response object, of all outputs that were added, and of `outputs`."""
        for output in outputs:
            self.add_output(output)
        output = self._merged_output()
        status = _STATUS_OF_FINISH_REASON[output.finish_reason]
        return self._response(status, [self._message(status, self._part(output))], self._usage())

    def encode_stream_chunk(self, output: RequestOutput) -> bytes:
        """The server-sent events of one output."""
        self.add_output(output)
        opening = self._opening_events() if self.num_events == 0 else b""
        if not (output.text or output.logprobs):
            return opening
        return opening + self._part_event("response.output_text.delta", delta=output.text,
                                          logprobs=self._logprobs(output))

    def encode_stream_end(self) -> bytes:
        """The events that end a stream; they contain the whole response again."""
        response, part = self.build_response_object(), self._part(self._merged_output())
        message, = response["output"]
        return b"".join((
            self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._part_event("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{response['status']}", response=response)))

    def encode_stream_error(self, error: APIError) -> bytes:
        """The events that end a stream that has failed."""
        opening = self._opening_events() if self.num_events == 0 else b""
        code = _ERROR_CODE_OF_STATUS.get(error.status_code, "server_error")
        failed = self._response("failed", error={"code": code, "message": str(error)})
        return opening + self._event("response.failed", response=failed)

    @property
    def num_tokens_at_stream_end(self) -> int:
        """Number of tokens that encode_stream_end writes."""
        return self.num_tokens

    def is_slow_to_encode(self, num_tokens: int) -> bool:
        """True if encoding the tokens, or the repeated request fields, would block the event loop."""
        return self.echoes_much or super().is_slow_to_encode(num_tokens)

    def _opening_events(self):
        response = self._response("in_progress")
        return b"".join((
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._part_event("response.content_part.added", part=self._part(RequestOutput("")))))

    def _part_event(self, event_type, **fields):
        return self._event(event_type, item_id=self.message_id, output_index=0, content_index=0, **fields)

    def _event(self, event_type, **fields):
        data = encode_json({"type": event_type, "sequence_number": self.num_events, **fields})
        self.num_events += 1
        return b"event: " + event_type.encode() + b"\ndata: " + data + b"\n\n"

    def _response(self, status, output=(), usage=None, error=None):
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        completed_at = int(time.time()) if status == "completed" else None
        return {**self.common_fields, "status": status, "completed_at": completed_at, "error": error,
                "incomplete_details": incomplete, "output": list(output), "usage": usage,
                **self.echoed_fields}

    def _message(self, status, *parts):
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status,
                "content": [*parts]}

    def _part(self, output):
        return {"type": "output_text", "text": output.text, "annotations": [],
                "logprobs": self._logprobs(output)}

    def _merged_output(self):
        choice, = self.choices.values()
        return choice.merged_output()

    def _logprobs(self, output):
        return (super()._logprobs(output) or {"content": []})["content"]

    def _usage(self):
        """The usage under the Responses API's names. Cache writes are not billed here, so they are 0."""
        chat = super()._usage()
        return {"input_tokens": chat["prompt_tokens"], "output_tokens": chat["completion_tokens"],
                "total_tokens": chat["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "input_tokens_details": {**chat["prompt_tokens_details"], "cache_write_tokens": 0}}
