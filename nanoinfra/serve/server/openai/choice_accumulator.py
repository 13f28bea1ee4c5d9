"""Collects the outputs of one choice of a response that is not streamed.

It keeps little memory: a log-probability takes 12 bytes in flat arrays instead of 116 as Python objects
(vLLM's FlatLogprobs), and a token takes its characters instead of the 600 bytes of an output.
"""
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO

from nanoinfra.serve.engine.request_and_output import Logprob, RequestOutput


class FlatLogprobs:
    """A growing sequence of Logprob in flat arrays. Each must have a value, so not a prompt's first token."""

    def __init__(self):
        self.token_ids, self.logprobs = array("i"), array("d")           # of each position: its own, then the
        self.end_indices = array("q")        #   likeliest; where each position ends

    def extend(self, logprobs: Iterable[Logprob]) -> None:
        """Append the log-probabilities."""
        for each in logprobs:
            for token, value in ((each.token, each.logprob), *each.top_logprobs):
                self.token_ids.append(token)
                self.logprobs.append(value)
            self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.end_indices)

    def __iter__(self) -> Iterator[Logprob]:
        start = 0
        for end in self.end_indices:
            (token, value), *top = zip(self.token_ids[start:end], self.logprobs[start:end])
            yield Logprob(token, value, top)
            start = end


@dataclass
class ChoiceAccumulator:
    """The outputs of one choice (continuation), added up."""
    first_output: RequestOutput
    finish_reason: str | None = None
    text: StringIO = field(default_factory=StringIO)
    logprobs: FlatLogprobs = field(default_factory=FlatLogprobs)

    def append_output(self, output: RequestOutput) -> None:
        """Add the next output."""
        self.text.write(output.text)
        self.logprobs.extend(output.logprobs)
        self.finish_reason = output.finish_reason

    def merged_output(self) -> RequestOutput:
        """All outputs as one."""
        return replace(self.first_output, text=self.text.getvalue(), logprobs=self.logprobs,
                       finish_reason=self.finish_reason)
