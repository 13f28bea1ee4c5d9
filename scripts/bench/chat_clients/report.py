"""What each client's program here prints: a line of JSON for itself, and one for each case it has tried."""
import json
from collections.abc import Callable, Iterable


def report(client: str, version: str, cases: Iterable[Callable[[], str]]) -> int:
    """Try `cases`, each of which says what came or raises. Returns 1 where one has raised."""
    print(json.dumps({"client": client, "version": version}), flush=True)
    wrong = 0
    for case in cases:
        line = {"case": case.__name__.replace("_", " ")}
        try:
            line["result"] = case()
        except Exception as error:           # a client may fail in every way a program can
            wrong, line["wrong"] = 1, f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(line), flush=True)
    return wrong


def refusal(call: Callable[[], object], kind: type[Exception], *says: str) -> str:
    """The message of the error `kind` that `call` raises. AssertionError where it says none of `says`."""
    try:
        came = call()
    except kind as error:
        message = str(error)
        assert any(each in message for each in says), f"the reason is missing: {message}"
        return "refused: " + message[:200]
    raise AssertionError(f"it was not refused, but answered: {came!r:.300}")
