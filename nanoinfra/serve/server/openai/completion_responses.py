"""Responses of /v1/completions and /v1/chat/completions: one JSON object, or a stream of chunks (SSE).

Load generators take the arrival of a chunk as the time of its token. So the role comes with the first token,
never before it, and the usage comes in a last chunk whose list of choices is empty (`include_usage`).
"""
import json
import time
from collections.abc import Sequence
from io import StringIO
from math import isfinite

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Logprob, Request, RequestOutput
from nanoinfra.serve.engine.token_text_and_offsets import SingleTokenDecoder, TextOffsets
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai.choice_accumulator import ChoiceAccumulator
from nanoinfra.serve.server.openai.completion_requests import BaseCompletionRequest

_SSE_DONE = b"data: [DONE]\n\n"
_MAX_TOKENS_ENCODED_INLINE = 2048            # tokens and log-probabilities; more are encoded in a thread


def encode_sse_event(data: dict) -> bytes:
    """`data` as one server-sent event (SSE)."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def encode_json(data: dict) -> bytes:
    """`data` as JSON. Slower than json.dumps, but other threads can run meanwhile."""
    out = StringIO()
    out.writelines(json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(data))
    return out.getvalue().encode()


class BaseCompletionResponse:
    """Builds the response to `request` from the outputs of its `engine_requests`.

    Choice i x n + j is the j-th continuation of prompt i. Raises APIError if an echo would be too large.
    """
    object_type, chunk_object_type = "", ""  # OpenAI's field `object`, of a response and of a chunk
    num_tokens_at_stream_end = 0             # that encode_stream_end writes

    def __init__(self, request: BaseCompletionRequest, response_id: str, model_name: str,
                 engine_requests: Sequence[Request], tokenizer: Tokenizer):
        self.request = request
        self.tokenizer, self.token_decoder = tokenizer, SingleTokenDecoder(tokenizer)
        self.common_fields = {"id": response_id, "created": int(time.time()), "model": model_name}
        self.engine_requests = {each.request_id: each for each in engine_requests}
        self.first_choice_index = {each.request_id: i * request.n for i, each in enumerate(engine_requests)}
        self.started_choices = set()         # indices of choices that have had an output
        self.choices = {}                    # {(request id, index): ChoiceAccumulator}, without a stream
        self.num_prompt_tokens = sum(len(each.prompt_token_ids) for each in engine_requests)
        self.num_generated_tokens = 0
        self.num_cached_tokens = {}          # by request id

    def encode_stream_chunk(self, output: RequestOutput) -> bytes:
        """The server-sent event of one output; empty if it has nothing for the client."""
        self._count_tokens(output)
        if not (output.text or output.logprobs or output.finish_reason or self._echoes(output)):
            return b""
        chunk = self._chunk([self._stream_choice(output)], self.request.stream_options.continuous_usage_stats)
        return b"data: " + encode_json(chunk) + b"\n\n" if output.prompt_logprobs else encode_sse_event(chunk)

    def encode_stream_end(self) -> bytes:
        """The end of a stream."""
        with_usage = self.request.stream_options.include_usage
        return (encode_sse_event(self._chunk([], True)) if with_usage else b"") + _SSE_DONE

    def encode_stream_error(self, error: APIError) -> bytes:
        """The end of a stream that has failed."""
        return encode_sse_event(error.error_body()) + _SSE_DONE

    def add_output(self, output: RequestOutput) -> None:
        """Add an output to the response object."""
        self._count_tokens(output)
        choice = output.request_id, output.index
        if choice not in self.choices:
            self.choices[choice] = ChoiceAccumulator(output)
        self.choices[choice].append_output(output)

    def build_response_object(self, outputs: Sequence[RequestOutput] = ()) -> dict:
        """The response object, of all outputs that were added, and of `outputs`."""
        for output in outputs:
            self.add_output(output)
        choices = [self._full_choice(choice.merged_output()) for choice in self.choices.values()]
        return {**self.common_fields, "object": self.object_type,
                "choices": sorted(choices, key=lambda each: each["index"]), "usage": self._usage()}

    def encode_response_object(self) -> bytes:
        """The response object as JSON."""
        return encode_json(self.build_response_object())

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the response object, with prompts that were scored, plus its choices."""
        scored = sum(1 + len(choice.first_output.prompt_logprobs) for choice in self.choices.values())
        return self.num_generated_tokens + scored

    def is_slow_to_encode(self, num_tokens: int) -> bool:
        """True if encoding `num_tokens` tokens with their log-probabilities would block the event loop."""
        logprobs = next(iter(self.engine_requests.values())).logprobs
        return num_tokens * (1 if logprobs is None else 2 + logprobs) > _MAX_TOKENS_ENCODED_INLINE

    def _chunk(self, choices, with_usage):
        chunk = {**self.common_fields, "object": self.chunk_object_type, "choices": choices}
        if self.request.stream_options.include_usage:
            chunk["usage"] = self._usage() if with_usage else None
        return chunk

    def _count_tokens(self, output):
        self.num_generated_tokens += len(output.token_ids)
        num_prompt_tokens = len(self.engine_requests[output.request_id].prompt_token_ids)
        self.num_cached_tokens.setdefault(output.request_id, min(output.num_cached_tokens, num_prompt_tokens))

    def _usage(self):
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": self.num_generated_tokens,
                "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens.values())}}

    def _starts_choice(self, output):
        """True for the first output of its choice."""
        new = self._choice_index(output) not in self.started_choices
        self.started_choices.add(self._choice_index(output))
        return new

    def _choice_index(self, output):
        return self.first_choice_index[output.request_id] + output.index


class CompletionResponse(BaseCompletionResponse):
    """The response of /v1/completions."""
    object_type = chunk_object_type = "text_completion"

    def __init__(self, *args):
        super().__init__(*args)
        self.offsets = {}                    # text offsets of each choice
        self.echoed_prompts = [each if isinstance(each, str) else self.tokenizer.decode(each)
                               for each in self.request.prompt] if self.request.echo else []
        request_limits.check_echo_size(sum(map(len, self.echoed_prompts)), self.request.n)

    def _echoes(self, output):
        return self.request.echo and self._choice_index(output) not in self.started_choices

    def _stream_choice(self, output):
        text = output.text
        if self._starts_choice(output) and self.request.echo:
            prompt_index = self.first_choice_index[output.request_id] // self.request.n
            text = self.echoed_prompts[prompt_index] + text
        return {"index": self._choice_index(output), "text": text, "logprobs": self._logprobs(output),
                "finish_reason": output.finish_reason}

    _full_choice = _stream_choice

    def _logprobs(self, output):
        if self.request.logprobs is None:
            return None
        logprobs, index = [*output.prompt_logprobs, *output.logprobs], self._choice_index(output)
        if index not in self.offsets:
            echoed = self.echoed_prompts[index // self.request.n] if self.request.echo else ""
            self.offsets[index] = TextOffsets(self.token_decoder, len(echoed))
        offsets = self.offsets[index]
        return {"tokens": [self.token_decoder.token_text(each.token) for each in logprobs],
                "token_logprobs": [_finite_or_minimum(each.logprob) for each in logprobs],
                "top_logprobs": [self._top_logprobs(each) for each in logprobs],
                "text_offset": offsets.prompt_offsets([each.token for each in output.prompt_logprobs])
                + [offsets.next_offset(each.token) for each in output.logprobs]}

    def _top_logprobs(self, each: Logprob):
        if each.logprob is None:
            return None
        likely = {}                          # two tokens may have the same text: keep the likelier
        for token, logprob in [*each.top_logprobs, (each.token, each.logprob)]:
            likely.setdefault(self.token_decoder.token_text(token), _finite_or_minimum(logprob))
        return likely


class ChatCompletionResponse(BaseCompletionResponse):
    """The response of /v1/chat/completions."""
    object_type, chunk_object_type = "chat.completion", "chat.completion.chunk"

    def _echoes(self, output):
        return False

    def _stream_choice(self, output):
        role = {"role": "assistant"} if self._starts_choice(output) else {}
        return {"index": output.index, "delta": {**role, "content": output.text},
                "logprobs": self._logprobs(output), "finish_reason": output.finish_reason}

    def _full_choice(self, output):
        return {"index": output.index, "message": {"role": "assistant", "content": output.text},
                "logprobs": self._logprobs(output), "finish_reason": output.finish_reason}

    def _logprobs(self, output):
        if not self.request.logprobs:
            return None
        return {"content": [{**self._token_logprob(each.token, each.logprob),
                             "top_logprobs": [self._token_logprob(*pair) for pair in each.top_logprobs]}
                            for each in output.logprobs]}

    def _token_logprob(self, token, logprob):
        return {"token": self.token_decoder.token_text(token), "logprob": _finite_or_minimum(logprob),
                "bytes": list(self.token_decoder.token_bytes(token))}  # a token may be a part of a character


def _finite_or_minimum(logprob):
    """JSON has no infinity; OpenAI writes -9999.0 for the log-probability of zero."""
    return logprob if logprob is None or isfinite(logprob) else -9999.0
