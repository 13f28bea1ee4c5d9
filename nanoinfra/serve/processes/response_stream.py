"""What a client waits for: the events of requests that the engine was asked, as they come."""
import asyncio
from collections.abc import Sequence

from nanoinfra.serve.engine.requests import Event, Request
from nanoinfra.serve.server.errors import Refused


class Job:
    """Requests under way at a Worker: iterate over their events, and close it in the end."""

    def __init__(self, worker, requests: Sequence[Request]):
        self.worker, self.news = worker, asyncio.Queue()
        self.open = {request.id: request.n for request in requests}       # continuations still to come

    def __aiter__(self):
        return self

    async def __anext__(self) -> Event:
        """Raises Refused where there is no answer."""
        if not self.open and self.news.empty():
            raise StopAsyncIteration
        news = await self.news.get()
        if isinstance(news, Refused):
            raise news
        return news

    def put(self, event: Event) -> None:
        """Called by the worker, with news."""
        self.news.put_nowait(event)
        if event.finish:
            self.open[event.request] -= 1
            if not self.open[event.request]:
                self._drop(event.request)

    def fail(self, request: str, why: Refused) -> None:
        """Called by the worker: nothing more comes."""
        self.news.put_nowait(why)
        self._drop(request)

    def close(self) -> None:
        """Give up what has not ended."""
        for request in list(self.open):
            self.worker.abort(request)
            self._drop(request)

    def _drop(self, request):
        del self.open[request], self.worker.jobs[request]
