"""One continuation of a request in the engine: its sequence, its draws, and what of its text may be shown."""
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanoinfra.serve.requests import Logprob, Request
from nanoinfra.serve.sampler import Sampler
from nanoinfra.serve.scheduler import Sequence
from nanoinfra.serve.writer import Writer


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

    def push(self, token: int, ends: Iterable[int], room: int) -> tuple[str, str | None]:
        """(text that may be shown now, why it ends here if it does)."""
        self.sequence.tokens.append(token)
        self.made += 1
        ended = token in ends and not self.request.ignore_eos
        text = self.writer.push(token) if self.writer and not ended else ""
        stopped = ended or bool(self.writer and self.writer.stopped)
        finish = "stop" if stopped else "length" if min(self.request.max_tokens, room) <= self.made else None
        return text + (self.writer.finish() if finish and self.writer else ""), finish
