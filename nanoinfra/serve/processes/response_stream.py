"""The stream of a client's outputs: what the engine generates for its requests, as it comes."""
import asyncio
from collections.abc import Sequence

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request, RequestOutput


class ResponseStream:
    """The outputs of requests that `client` (EngineClient) has sent. Iterate over it, and close it."""

    def __init__(self, client, requests: Sequence[Request]):
        self.client, self.queue = client, asyncio.Queue()
        self.unfinished = {request.request_id: request.n for request in requests}     # continuations to come

    def __aiter__(self):
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises APIError where there is no answer."""
        if not self.unfinished and self.queue.empty():
            raise StopAsyncIteration
        output = await self.queue.get()
        if isinstance(output, APIError):
            raise output
        return output

    def put_output(self, output: RequestOutput) -> None:
        """The client calls it with each new output."""
        self.queue.put_nowait(output)
        if output.finish_reason:
            self.unfinished[output.request_id] -= 1
            if not self.unfinished[output.request_id]:
                self._remove(output.request_id)

    def fail_request(self, request_id: str, error: APIError) -> None:
        """The client calls it where no more outputs of a request come."""
        self.queue.put_nowait(error)
        self._remove(request_id)

    def close(self) -> None:
        """Abort the requests that have not finished."""
        for request_id in list(self.unfinished):
            self.client.abort_request(request_id)
            self._remove(request_id)

    def _remove(self, request_id):
        del self.unfinished[request_id], self.client.streams[request_id]
