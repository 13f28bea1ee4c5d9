"""Limits of one request. A larger request is refused before any work, with the numbers and the rule.

Some limits follow from the model: n characters are at least n / max_chars_per_token tokens, so a text
longer than context_length x max_chars_per_token cannot fit a prompt. The other limits are constants here,
because parsing JSON and writing log-probabilities stop all other threads of the API process.
"""
from collections.abc import Sequence

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import CONTEXT_LENGTH_EXCEEDED, APIError
from nanoinfra.serve.engine.request_and_output import Request

MAX_BODY_BYTES = 1 << 19                     # a context longer than 65,536 tokens gets 8 a token
MAX_PROMPTS_PER_REQUEST = 1024               # of one HTTP request, and choices of one response
MAX_MESSAGES = 4096
MAX_TOOLS = 128                              # OpenAI's limit
MAX_TOOL_CALLS_PER_MESSAGE = 128
MAX_STOP_STRINGS = 64
_MAX_STOP_CHARS = 1024                       # of all stop strings: each is searched at every token
MAX_CACHE_SALT_CHARS = 1024
MAX_LOGIT_BIASES = 1024                      # tokens in logit_bias
_MIN_LOGPROB_LIMIT = 1 << 16                 # of one response; about 400 bytes each while it is encoded
_MAX_CONTEXTS_PER_RESPONSE = 64              # one response: generated and echoed tokens
_TOKENIZE_CHUNK_CHARS = 1 << 16              # tokenizing takes about 200 bytes each


def max_body_bytes(context_length: int) -> int:
    """The maximum size of a request body, in bytes, for a model with this context."""
    return max(MAX_BODY_BYTES, 8 * context_length)


def max_logprobs_per_response(context_length: int) -> int:
    """The maximum number of log-probabilities in one response: at least two for each token of the context."""
    return max(_MIN_LOGPROB_LIMIT, 2 * context_length)


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Raise ValueError for stop strings that take too long to search."""
    if (size := sum(map(len, stop_strings))) > _MAX_STOP_CHARS:
        raise ValueError(f"stop strings of {size} characters; give at most {_MAX_STOP_CHARS} in all")


def check_text_length(num_chars: int, context_length: int, max_chars_per_token: int) -> None:
    """Raise APIError for a text that is too long for the context, however it is tokenized."""
    if num_chars > (limit := context_length * max_chars_per_token):
        raise APIError(400, f"a text of {num_chars} characters cannot fit the model's context of "
                       f"{context_length} tokens of at most {max_chars_per_token} characters; shorten it to "
                       f"less than {limit}", "prompt", CONTEXT_LENGTH_EXCEEDED)


def check_fits_kv_cache(request: Request, engine_info: dict) -> None:
    """Raise APIError for a prompt that does not fit the KV cache. `engine_info`: Engine.static_info()."""
    capacity = engine_info.get("blocks", 0) * engine_info.get("block_size", 0)     # tokens
    if capacity and len(request.prompt_token_ids) >= capacity:
        raise APIError(400, f"a prompt of {len(request.prompt_token_ids)} tokens and one more do not fit the "
                       f"KV memory, which holds {capacity}; shorten it, or give the server more memory",
                       "prompt", CONTEXT_LENGTH_EXCEEDED)


def check_num_choices(num_prompts: int, n: int) -> None:
    """Raise APIError for more choices than one response may have."""
    if num_prompts * n > MAX_PROMPTS_PER_REQUEST:
        raise APIError(400, f"{num_prompts} prompts and n = {n} make {num_prompts * n} choices; ask for at "
                       f"most {MAX_PROMPTS_PER_REQUEST} at once", "n")


def tokenize_prompt(text: str, tokenizer: Tokenizer, context_length: int,
                    add_special_tokens: bool = True) -> list[int]:
    """The token ids of `text`. Raises APIError, as early as possible, for a text that does not fit.

    A long text is first tokenized in chunks, because tokenizing takes a hundred times the memory of the
    text. Cuts between chunks add a few tokens, so a text is refused only at twice the context.
    """
    check_text_length(len(text), context_length, tokenizer.max_chars_per_token)
    try:
        return _tokenize_in_chunks(text, tokenizer, context_length, add_special_tokens)
    except APIError:
        raise
    except Exception as error:               # a tokenizer may have no token for unknown text
        raise APIError(400, f"the model's tokenizer does not take this text: {error}", "prompt") from error


def _tokenize_in_chunks(text, tokenizer, context_length, add_special_tokens):
    size, count = _TOKENIZE_CHUNK_CHARS, 0
    for end in range(size, len(text) + size, size) if len(text) > size else ():
        count += len(tokenizer.encode(text[end - size:end], False))
        if count > 2 * context_length:
            raise APIError(400, f"the first {min(end, len(text))} characters of the prompt are {count} "
                           f"tokens and the model's context is {context_length}; shorten it", "prompt",
                           CONTEXT_LENGTH_EXCEEDED)
    return tokenizer.encode(text, add_special_tokens)


def check_total_prompt_tokens(num_tokens: int, context_length: int) -> None:
    """Raise APIError if the prompts of one request have too many tokens in total."""
    if num_tokens > (limit := _MAX_CONTEXTS_PER_RESPONSE * context_length):
        raise APIError(400, f"prompts of {num_tokens} tokens in one request; send at most "
                       f"{_MAX_CONTEXTS_PER_RESPONSE} contexts of {context_length}, {limit}, at once",
                       "prompt")


def _max_response_size(requests: Sequence[Request], echo: bool) -> tuple[int, int]:
    """(tokens, log-probabilities) that the response to `requests` can have at most."""
    num_tokens = sum(r.n * (r.max_tokens + echo * len(r.prompt_token_ids)) for r in requests)
    first = requests[0]
    each = (1 + (first.logprobs or 0)) if first.prompt_logprobs or first.logprobs is not None else 0
    return num_tokens, each * num_tokens


def default_max_tokens(context_length: int, n: int, num_logprobs: int | None) -> int:
    """max_tokens of each of `n` choices when the client gives none, so that the response is not too large."""
    n = max(1, n)
    limit = _MAX_CONTEXTS_PER_RESPONSE * context_length // n
    if num_logprobs is None:
        return limit
    return min(limit, max_logprobs_per_response(context_length) // (n * (1 + max(0, num_logprobs))))


def check_response_size(requests: Sequence[Request], echo: bool, context_length: int) -> None:
    """Raise APIError for a response that may become too large."""
    num_tokens, num_logprobs = _max_response_size(requests, echo)
    if num_tokens > (limit := _MAX_CONTEXTS_PER_RESPONSE * context_length):
        raise APIError(400, f"the answer may come to {num_tokens} tokens; ask for at most "
                       f"{_MAX_CONTEXTS_PER_RESPONSE} contexts of {context_length}, {limit}: lower "
                       "max_tokens or n", "max_tokens")
    if num_logprobs > (limit := max_logprobs_per_response(context_length)):
        raise APIError(400, f"the answer may come to {num_logprobs} log-probabilities, "
                       f"{num_logprobs // num_tokens} for each of {num_tokens} tokens; ask for {limit}: "
                       "lower max_tokens, n or logprobs")


def check_echo_size(num_chars: int, n: int) -> None:
    """Raise APIError if prompts of `num_chars` characters, echoed `n` times, are too much."""
    if num_chars * n > MAX_BODY_BYTES:
        raise APIError(400, f"echo would say {num_chars} characters {n} times; ask for at most "
                       f"{MAX_BODY_BYTES} in all: lower n", "echo")
