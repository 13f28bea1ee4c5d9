"""What a client is told when it gets no answer: a status, and the reason in OpenAI's JSON."""

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"          # OpenAI's code, by which clients know to shorten
MOST_CHARS = 1000                            # of a reason: it may say what a stranger has sent


class Refused(Exception):
    """No answer: HTTP `status`, why, which parameter is to blame, and OpenAI's code where there is one.

    A code is a word and never a number: clients compare it with words such as CONTEXT_LENGTH_EXCEEDED.
    """

    def __init__(self, status: int, why: str, param: str | None = None, code: str | None = None):
        super().__init__(shortened(why))
        self.status, self.param, self.code = status, param and shortened(param), code

    def body(self) -> dict:
        """The error as clients expect it."""
        return {"error": {"message": str(self), "type": KINDS.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to come back, where that helps."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def shortened(text: str) -> str:
    """`text`, or its beginning where it is longer than a reason should be."""
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + " ..."
