"""The engine as the API process sees it: a client in the event loop; the engine runs in processes of its own.

A keeper thread starts the ranks, passes their messages to the event loop, and restarts all of them when one
has died or hangs; open requests then get an error. The keeper lives as long as the ranks do, because Linux
takes the end of the thread that started a process for the end of its parent. The event loop never waits for
either: not for an engine that takes no commands, nor for one that does not die.
"""
import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.processes.engine_processes import EngineProcesses, ProcessDied
from nanoinfra.serve.processes.response_stream import ResponseStream
from nanoinfra.serve.processes.tensor_parallel_group import TensorParallelGroup

_MAX_RESTART_DELAY_SECONDS = 5.0             # about what loading takes
_SILENT_TICKS_UNTIL_HUNG = 10                # an engine with work that is silent for more ticks hangs
_KILL_TIMEOUT_SECONDS = 5.0                  # in which a killed process is gone


class EngineClient:
    """A client of the engine that `engine_factory(tp_group)` makes on each of `num_ranks` ranks.

    `metrics` is told what happens. `state` is "loading", "ready", "restarting", "failed" or "stopped";
    `state_reason` says more, and `load_error` why the engine cannot be loaded. The ranks hang when they send
    nothing for `hang_timeout` seconds while there is work; time in which this process itself stands still
    does not count. After ranks that computed a step, others start at once; otherwise each delay is twice the
    last, up to _MAX_RESTART_DELAY_SECONDS. Methods belong to the event loop in which `start` was called.
    """

    def __init__(self, engine_factory: Callable[[TensorParallelGroup], object], metrics, num_ranks: int = 1,
                 hang_timeout: float = 300.0):
        self.engine_factory, self.metrics = engine_factory, metrics
        self.num_ranks, self.hang_timeout = num_ranks, hang_timeout
        self.state, self.state_reason = "loading", "the model is being loaded"
        self.load_error = ""
        self.engine_ready: EngineReady | None = None
        self.stats = {}                      # Engine.stats() of the last step
        self.streams: dict[str, ResponseStream] = {}
        self.untaken_tokens: deque[int] = deque()    # of each command that the engine has not taken yet
        self.processes, self.newest_processes = None, None   # those that are asked; the keeper's
        self.silent_ticks = 0
        self.stop_requested, self.processes_gone = threading.Event(), asyncio.Event()

    def start(self) -> None:
        """Start the ranks; they load the model while the event loop goes on."""
        self.loop = asyncio.get_running_loop()
        self.keeper = threading.Thread(target=self._keep_running, name="keeper of the engine", daemon=True)
        self.keeper.start()
        self._tick()

    def stop(self) -> None:
        """Kill the ranks (they hold nothing that would have to be closed) and fail all open requests.

        `join` waits for their end. A second call does nothing.
        """
        self._on_engine_lost("stopped", "the server ends")
        self.timer.cancel()
        self.stop_requested.set()
        if self.newest_processes:
            self.newest_processes.kill_all()

    async def join(self) -> None:
        """Wait, after `stop`, until the ranks are gone; a process that cannot be killed is reported."""
        try:
            await asyncio.wait_for(self.processes_gone.wait(), _KILL_TIMEOUT_SECONDS)
            self.keeper.join()
        except TimeoutError:
            ranks = self.newest_processes.processes if self.newest_processes else []
            left = ", ".join(str(rank.pid) for rank in ranks if rank.returncode is None)
            print(f"nanoinfra: left behind, for {_KILL_TIMEOUT_SECONDS:g} s after SIGKILL it is still there: "
                  f"process {left}", file=sys.stderr, flush=True)

    def submit_requests(self, requests: Sequence[Request]) -> ResponseStream:
        """Send requests to the engine; the stream gives their outputs. Raises APIError without an engine."""
        if self.state != "ready":
            raise APIError(503, self.state_reason)
        stream = ResponseStream(self, requests)
        for request in requests:
            self.streams[request.request_id] = stream
            self.metrics.record_request_arrival(request)
            num_tokens = len(request.prompt_token_ids)
            if self._has_room(num_tokens):
                self._send("add", request, num_tokens)
            else:
                self._refuse(request.request_id, 429, "the engine takes no requests now: "
                             f"{len(self.untaken_tokens)} of {sum(self.untaken_tokens)} tokens wait for it; "
                             "come back later")
        return stream

    def abort_request(self, request_id: str) -> None:
        """Request cancellation: nobody wants the answer any more, so the engine may drop the request."""
        self.metrics.record_request_drop(request_id, "abort")
        self._send("abort", request_id)

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Raises APIError while there is no engine, or one that takes nothing."""
        if self.state != "ready":
            raise APIError(503, self.state_reason)
        if not self._has_room(0):
            raise APIError(429, "the engine takes no requests now; come back later")
        self._send("reset")

    def _send(self, verb, value=None, tokens=0):
        self.untaken_tokens.append(tokens)
        self.processes.send_command((verb, value))

    def _has_room(self, tokens):
        """May one more command wait until the engine takes it? Aborts always may: at most one an add."""
        most_requests, most_tokens = self.engine_ready.max_in_flight
        waiting = self.untaken_tokens
        return not waiting or (len(waiting) < most_requests and sum(waiting) + tokens <= most_tokens)

    def _on_message(self, processes, message):
        """In the event loop: handle a message of rank 0 or of a rank that is loaded."""
        if self.state == "stopped":
            return
        self.silent_ticks = 0
        if isinstance(message, EngineReady):
            self.processes, self.engine_ready = processes, message
            self.state, self.state_reason = "ready", ""
            return self.metrics.record_engine_start(message.info)
        for _ in range(message.num_commands_taken):
            self.untaken_tokens.popleft()
        self.stats = message.stats
        self.metrics.record_engine_step(message)
        for request_id, status, why in message.refused_requests:
            if request_id in self.streams:
                self._refuse(request_id, status, why)
        for output in message.outputs:
            if output.request_id in self.streams:
                self.streams[output.request_id].put_output(output)

    def _refuse(self, request_id, status, why):
        self.metrics.record_request_drop(request_id)
        self.streams[request_id].fail_request(request_id, APIError(status, why))

    def _on_engine_lost(self, state, why):
        """In the event loop: there is no engine now. All open requests fail."""
        if self.state == "stopped":
            return                           # by us
        self.load_error = why if state == "failed" else self.load_error
        self.state, self.state_reason = state, why
        self.stats = {}
        self.untaken_tokens.clear()
        for request_id in list(self.streams):
            self._refuse(request_id, 503, why)

    def _tick(self):
        """In the event loop, _SILENT_TICKS_UNTIL_HUNG times in `hang_timeout`: kill an engine that hangs."""
        self.silent_ticks = self.silent_ticks + 1 if self.streams or self.untaken_tokens else 0
        if self.silent_ticks > _SILENT_TICKS_UNTIL_HUNG:
            self.processes.kill_all(f"the engine has said nothing for {self.hang_timeout:g} s")
        self.timer = self.loop.call_later(self.hang_timeout / _SILENT_TICKS_UNTIL_HUNG, self._tick)

    def _keep_running(self):
        """The keeper thread."""
        try:
            self._restart_until_stopped()
        except Exception as bug:
            self._post(self._on_engine_lost, "failed", f"the engine cannot be kept running: {bug!r}")
            raise
        finally:
            self._post(self.processes_gone.set)

    def _restart_until_stopped(self):
        delay, loaded = 0.0, False
        while not self.stop_requested.wait(delay):
            self.newest_processes = processes = EngineProcesses(self.engine_factory, self.num_ranks)
            if self.stop_requested.is_set():
                processes.kill_all()         # `stop` may not have seen it
            why = self._pass_on_messages(processes)
            processes.kill_and_wait()
            loaded |= processes.loaded
            self._post(self._on_engine_lost, "restarting" if loaded else "failed", why)
            if not loaded:
                return                       # the next would end as this one has
            delay = 0.0 if processes.has_stepped else min(_MAX_RESTART_DELAY_SECONDS, 2 * delay + 0.1)

    def _pass_on_messages(self, processes):
        """Pass messages of the ranks to the event loop until they are gone; returns why they are."""
        try:
            while True:
                for message in processes.receive_messages():
                    self._post(self._on_message, processes, message)
        except ProcessDied as death:
            return str(death)

    def _post(self, call, *args):
        with suppress(RuntimeError):                         # the event loop is closed already
            self.loop.call_soon_threadsafe(call, *args)
