"""A fake engine that fails with some requests. No torch, so that its processes start soon."""
from nanoinfra.serve.engine.request_and_output import RequestOutput
from tests.serve.fake import Fake


class Failing(Fake):
    """Takes no prompt with "odd" in it, and fails in a step with one in which there is "bad"."""

    def add_request(self, request):
        super().add_request(request)
        if "odd" in self.tokenizer.decode(request.prompt_token_ids):
            self.abort_request(request.request_id)
            raise RuntimeError("it is odd")

    def _say(self, sequence):
        request, *_ = self.runs[sequence]
        bad = "bad" in self.tokenizer.decode(request.prompt_token_ids)
        if bad and len(sequence.tokens) > sequence.num_prompt_tokens + 1:
            self.abort_request(request.request_id)
            return RequestOutput(request.request_id, 0, "it is bad", finish_reason="error")
        return super()._say(sequence)


def failing(team, **options):
    """The factory."""
    return Failing(**options)
