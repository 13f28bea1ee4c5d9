"""Errors for clients: an HTTP status, and the reason in OpenAI's JSON form of an error."""

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"          # OpenAI's code: clients then shorten the prompt
MAX_ERROR_MESSAGE_CHARS = 1000               # it may quote what a client has sent


class APIError(Exception):
    """A request that gets an error: HTTP status, message, the parameter at fault, and OpenAI's error code.

    A code is a word and never a number: clients compare it with words such as CONTEXT_LENGTH_EXCEEDED.
    """

    def __init__(self, status_code: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(_truncate(message))
        self.status_code, self.param, self.code = status_code, param and _truncate(param), code

    def error_body(self) -> dict:
        """The JSON body of the error, in OpenAI's form."""
        return {"error": {"message": str(self),
                          "type": _ERROR_TYPES.get(self.status_code, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def retry_headers(self) -> dict[str, str]:
        """HTTP headers that say when to try again, for 429 and 503."""
        return {"Retry-After": "1"} if self.status_code in (429, 503) else {}


def _truncate(message: str) -> str:
    """`message`, or its beginning if it is longer than MAX_ERROR_MESSAGE_CHARS."""
    return message if len(message) <= MAX_ERROR_MESSAGE_CHARS else message[:MAX_ERROR_MESSAGE_CHARS] + " ..."
