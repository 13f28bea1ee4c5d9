"""How much one request may ask for. What is larger is refused before any work, with the numbers and the rule.

What follows from the model: n characters are at least n / max_chars_per_token tokens, so a longer text than
context x max_chars_per_token fits no prompt. What does not is a number here: JSON is parsed, and an answer
with log-probabilities written, while no other thread of the API process runs.
"""
from collections.abc import Sequence

from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.engine.requests import Request
from nanoinfra.serve.server.errors import CONTEXT_LENGTH_EXCEEDED, Refused

MOST_BYTES = 1 << 19                         # of a body; a context longer than 65,536 tokens gives 8 a token
MOST_PROMPTS = 1024                          # in one HTTP request; and choices in one answer
MOST_MESSAGES = 4096
MOST_TOOLS = 128                             # OpenAI's limit
MOST_TOOL_CALLS = 128                        # of one message
MOST_STOPS = 64
MOST_STOP_CHARS = 1024                       # of all of them: each is looked for at every token
MOST_SALT_CHARS = 1024
MOST_BIASES = 1024                           # tokens in logit_bias
MOST_LOGPROBS = 1 << 16                      # in one answer; some 400 bytes each while it is written
ANSWERS = 64                                 # that fill the context, in one: tokens said and echoed
PIECE = 1 << 16                              # characters tokenized at once: some 200 bytes each meanwhile


def most_bytes(context: int) -> int:
    """Bytes that the body of a request may have, to a model with this context."""
    return max(MOST_BYTES, 8 * context)


def most_logprobs(context: int) -> int:
    """Log-probabilities that an answer may have: always those of a full context and of the likeliest."""
    return max(MOST_LOGPROBS, 2 * context)


def check_stops(stops: Sequence[str]) -> None:
    """Raise ValueError for stop strings that cost too much to look for."""
    if (size := sum(map(len, stops))) > MOST_STOP_CHARS:
        raise ValueError(f"stop strings of {size} characters; give at most {MOST_STOP_CHARS} in all")


def check_chars(chars: int, context: int, max_chars_per_token: int) -> None:
    """Raise Refused for a text of so many characters that no context of tokens can spell."""
    if chars > (most := context * max_chars_per_token):
        raise Refused(400, f"a text of {chars} characters cannot fit the model's context of {context} tokens "
                           f"of at most {max_chars_per_token} characters; shorten it to less than {most}",
                      "prompt", CONTEXT_LENGTH_EXCEEDED)


def check_memory(request: Request, info: dict) -> None:
    """Raise Refused for a prompt that the engine's KV memory (`info`: Engine.static_info()) cannot hold."""
    room = info.get("blocks", 0) * info.get("block_size", 0)
    if room and len(request.prompt_token_ids) >= room:
        raise Refused(400, f"a prompt of {len(request.prompt_token_ids)} tokens and one more do not fit the "
                           f"KV memory, which holds {room}; shorten it, or give the server more memory",
                      "prompt", CONTEXT_LENGTH_EXCEEDED)


def check_choices(prompts: int, n: int) -> None:
    """Raise Refused for more choices than an answer may have."""
    if prompts * n > MOST_PROMPTS:
        raise Refused(400, f"{prompts} prompts and n = {n} make {prompts * n} choices; ask for at most "
                           f"{MOST_PROMPTS} at once", "n")


def encode(text: str, tokenizer: Text, context: int, begin: bool = True) -> list[int]:
    """The ids of `text`. Raises Refused, before all of it is tokenized, where they cannot fit the context.

    A long text is tried in pieces first, for tokens take a hundred times what their characters do. Cuts add
    a few tokens, so that only twice the context refuses.
    """
    check_chars(len(text), context, tokenizer.max_chars_per_token)
    try:
        return _encode(text, tokenizer, context, begin)
    except Refused:
        raise
    except Exception as error:               # a tokenizer without a token for what it does not know
        raise Refused(400, f"the model's tokenizer does not take this text: {error}", "prompt") from error


def _encode(text, tokenizer, context, begin):
    ends, count = range(PIECE, len(text) + PIECE, PIECE) if len(text) > PIECE else (), 0
    for end in ends:
        count += len(tokenizer.encode(text[end - PIECE:end], False))
        if count > 2 * context:
            raise Refused(400, f"the first {min(end, len(text))} characters of the prompt are {count} tokens "
                               f"and the model's context is {context}; shorten it", "prompt",
                          CONTEXT_LENGTH_EXCEEDED)
    return tokenizer.encode(text, begin)


def check_prompt_tokens(tokens: int, context: int) -> None:
    """Raise Refused where the prompts of one request have more tokens than it may bring."""
    if tokens > (most := ANSWERS * context):
        raise Refused(400, f"prompts of {tokens} tokens in one request; send at most {ANSWERS} contexts of "
                           f"{context}, {most}, at once", "prompt")


def answer_size(requests: Sequence[Request], echo: bool) -> tuple[int, int]:
    """(tokens, log-probabilities) that the answer to `requests` can come to."""
    tokens = sum(r.n * (r.max_tokens + echo * len(r.prompt_token_ids)) for r in requests)
    first = requests[0]
    each = (1 + (first.logprobs or 0)) if first.prompt_logprobs or first.logprobs is not None else 0
    return tokens, each * tokens


def most_tokens(context: int, n: int, logprobs: int | None) -> int:
    """New tokens for each of `n` choices, where the client leaves it open."""
    n = max(1, n)
    most = ANSWERS * context // n
    return most if logprobs is None else min(most, most_logprobs(context) // (n * (1 + max(0, logprobs))))


def check_answer(requests: Sequence[Request], echo: bool, context: int) -> None:
    """Raise Refused for an answer that would be too large."""
    tokens, logprobs = answer_size(requests, echo)
    if tokens > (most := ANSWERS * context):
        raise Refused(400, f"the answer may come to {tokens} tokens; ask for at most {ANSWERS} contexts of "
                           f"{context}, {most}: lower max_tokens or n", "max_tokens")
    if logprobs > (most := most_logprobs(context)):
        raise Refused(400, f"the answer may come to {logprobs} log-probabilities, {logprobs // tokens} for "
                           f"each of {tokens} tokens; ask for {most}: lower max_tokens, n or logprobs")


def check_echo(chars: int, n: int) -> None:
    """Raise Refused where prompts of so many characters would be echoed `n` times."""
    if chars * n > MOST_BYTES:
        raise Refused(400, f"echo would say {chars} characters {n} times; ask for at most {MOST_BYTES} in "
                           "all: lower n", "echo")
