"""One continuation of a request in the engine: its sequence, its draws, and what of its text may be shown."""
from collections.abc import Set
from dataclasses import dataclass, field

from nanoinfra.serve.engine.detokenizer import Writer
from nanoinfra.serve.engine.requests import Logprob, Request
from nanoinfra.serve.engine.sampler import Sampler
from nanoinfra.serve.engine.scheduler import Sequence


@dataclass(eq=False)
class Run:
    """The continuation `index` of `request`."""
    request: Request
    index: int
    sequence: Sequence
    sampler: Sampler
    writer: Writer | None                    # None: tokens alone are wanted
    prompt: list[Logprob] = field(default_factory=list)                  # if echo
    made: int = 0                            # tokens
    again: bool = False                      # has it been computed anew, after numbers that were not finite?

    def banned(self, ends: Set[int]) -> list[int]:
        """Tokens that may not come next: all that would end a text of which `min_tokens` must come."""
        return sorted({*ends, *self.request.stop_token_ids}) if self.made < self.request.min_tokens else []

    def push(self, token: int, ends: Set[int], room: int) -> tuple[str, str | None]:
        """(text that may be shown now, why it ends here if it does)."""
        self.sequence.tokens.append(token)
        self.made += 1
        request, early = self.request, self.made <= self.request.min_tokens
        ended = token in ends and not request.ignore_eos and not early
        text = self._write(token, early) if self.writer and not ended else ""
        stopped = ended or not early and (token in request.stop_token_ids
                                          or bool(self.writer and self.writer.stopped))
        finish = "stop" if stopped else "length" if min(request.max_tokens, room) <= self.made else None
        return text + (self.writer.finish() if finish and self.writer else ""), finish

    def _write(self, token, early):
        self.writer.passes = early
        return self.writer.push(token)
