"""A fake engine that fails with some requests. No torch, so that its processes start soon."""
from nanoinfra.serve.engine.requests import Event
from tests.serve.fake import Fake


class Failing(Fake):
    """Takes no prompt with "odd" in it, and fails in a step with one in which there is "bad"."""

    def add(self, request):
        super().add(request)
        if "odd" in self.text.decode(request.tokens):
            self.abort(request.id)
            raise RuntimeError("it is odd")

    def _say(self, sequence):
        request, *_ = self.runs[sequence]
        if "bad" in self.text.decode(request.tokens) and len(sequence.tokens) > sequence.prompt + 1:
            self.abort(request.id)
            return Event(request.id, 0, "it is bad", finish="error")
        return super()._say(sequence)


def failing(team, **options):
    """The factory."""
    return Failing(**options)
