"""The state of one continuation of a request in the engine: its sequence, sampler and detokenizer."""
from collections.abc import Set
from dataclasses import dataclass, field

from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Logprob, Request
from nanoinfra.serve.engine.sampler import Sampler
from nanoinfra.serve.engine.scheduler import Sequence


@dataclass(eq=False)
class RequestState:
    """The continuation `index` (of n) of `request`."""
    request: Request
    index: int
    sequence: Sequence
    sampler: Sampler
    detokenizer: StopStringDetokenizer | None            # None: outputs have token ids alone, without text
    prompt_logprobs: list[Logprob] = field(default_factory=list)         # if the request wants them
    num_output_tokens: int = 0
    recomputed: bool = False                 # was it computed again, after numbers that were not finite?

    def banned_token_ids(self, eos_token_ids: Set[int]) -> list[int]:
        """Tokens that may not come next: those that would end a text that has not its `min_tokens` yet."""
        if self.num_output_tokens >= self.request.min_tokens:
            return []
        return sorted({*eos_token_ids, *self.request.stop_token_ids})

    def append_token(self, token: int, eos_token_ids: Set[int],
                     max_output_tokens: int) -> tuple[str, str | None]:
        """Append a new token: (text that may be shown now, the finish reason or None)."""
        self.sequence.tokens.append(token)
        self.num_output_tokens += 1
        request, early = self.request, self.num_output_tokens <= self.request.min_tokens
        ended = token in eos_token_ids and not request.ignore_eos and not early
        text = self._detokenize(token, early) if self.detokenizer and not ended else ""
        stopped = ended or not early and (token in request.stop_token_ids
                                          or bool(self.detokenizer and self.detokenizer.stopped))
        full = min(request.max_tokens, max_output_tokens) <= self.num_output_tokens
        finish_reason = "stop" if stopped else "length" if full else None
        return text + (self.detokenizer.flush() if finish_reason and self.detokenizer else ""), finish_reason

    def _detokenize(self, token, early):
        self.detokenizer.ignore_stop_strings = early
        return self.detokenizer.push_token(token)
