"""Keys: where they come from, who sees them, how clients send them, and what stays apart under each."""
import os
import sys
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.serve.command_line_options import EngineOptions, ServeOptions
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.server.http.access_control import AccessPolicy
from nanoinfra.serve.server.http.api_keys import (
    API_KEY_VARIABLE,
    cache_salt_of_key,
    find_bearer_key,
    prepend_cache_salt,
    read_api_keys,
)
from tests.processes import children
from tests.serve.host import CODE, serving, started

SECRET = "sk-do-not-show-this"


def options(**how):
    return ServeOptions(EngineOptions("m"), **how)


@pytest.fixture
def file(tmp_path):
    """write(text, mode): a file of keys."""
    def write(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return path
    return write


def test_keys_come_from_a_file_the_environment_or_a_flag(file, capsys):
    assert read_api_keys(options(), {}) == ()
    several = file("one\ntwo words\r\nsésame\n")
    assert read_api_keys(options(api_key_file=several), {}) == ("one", "two words", "sésame")
    assert read_api_keys(options(api_key_file=file(SECRET)), {}) == (SECRET,)
    environment = {API_KEY_VARIABLE: SECRET, "HOME": "/"}
    assert read_api_keys(options(), environment) == (SECRET,) and environment == {"HOME": "/"}
    assert capsys.readouterr().err == ""
    assert read_api_keys(options(api_key=SECRET), {}) == (SECRET,)
    said = capsys.readouterr().err
    assert "shows in ps" in said and API_KEY_VARIABLE in said and SECRET not in said


def test_a_file_that_others_may_read_is_told_of(file, capsys):
    assert read_api_keys(options(api_key_file=file(SECRET, 0o640)), {}) == (SECRET,)
    said = capsys.readouterr().err
    assert "640" in said and "chmod 600" in said and SECRET not in said


WRONG = {"an empty file": ("", "is empty"), "an empty line": ("a\n\nb\n", "line 2"),
         "a space": ("a\n b\n", "line 2"),
         "a tab inside": (f"{SECRET}\tx", "line 1"), "no text": (b"\xff\xfe", "no UTF-8"),
         "an escape": (f"{SECRET}\x1b[2J", "line 1"), "only a line's end": ("\n", "line 1")}


@pytest.mark.parametrize("text, says", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_a_key_is_refused_and_not_shown(file, text, says):
    with pytest.raises(ValueError, match=says) as error:
        read_api_keys(options(api_key_file=file(text)), {})
    assert SECRET not in str(error.value)


def test_mistakes_with_keys_have_a_remedy(file, tmp_path):
    with pytest.raises(ValueError, match="--api-key and NANOINFRA_API_KEY; give one"):
        read_api_keys(options(api_key="a"), {API_KEY_VARIABLE: "a"})
    with pytest.raises(ValueError, match="--api-key-file; give one"):
        read_api_keys(options(api_key="a", api_key_file=file("a")), {})
    with pytest.raises(ValueError, match="NANOINFRA_API_KEY is empty; leave it out"):
        read_api_keys(options(), {API_KEY_VARIABLE: ""})
    with pytest.raises(ValueError, match="--api-key is empty; leave it out"):
        read_api_keys(options(api_key=""), {})
    with pytest.raises(ValueError, match="No such file"):
        read_api_keys(options(api_key_file=tmp_path / "nowhere"), {})
    with pytest.raises(ValueError, match="needs keys"):
        read_api_keys(options(cache_salt_per_key=True), {})


def test_help_and_errors_show_no_key(monkeypatch, capsys):
    monkeypatch.setenv(API_KEY_VARIABLE, SECRET)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--api-key-file" in capsys.readouterr().out
    assert main(["serve", "m", "--api-key", SECRET]) == 2
    assert main(["serve", "m", "--api-key", SECRET, "--no-such-flag"]) == 2
    assert SECRET not in capsys.readouterr().err and SECRET not in repr(options(api_key=SECRET))


@pytest.mark.parametrize("header", [b"Bearer %s", b"bearer %s", b"BEARER   %s", b"Bearer %s  "])
def test_a_key_is_known_in_every_spelling_of_its_scheme(header):
    for key in ("plain", "two words", "sésame", "voilà"):
        sent = (header % key.encode()).decode("latin-1")
        assert find_bearer_key(("other", key, "third"), sent) == key


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic plain", "plain", "Bearerplain",
                                    "Bearer plai", "Bearer plainx", "Bearer Bearer plain", "Bearer PLAIN",
                                    "Bearer \xff\xfe"])
def test_nothing_else_is_a_key(header):
    assert find_bearer_key(("plain",), header) is None and find_bearer_key((), header) is None


def test_several_keys_and_a_wrong_one():
    with serving(access=AccessPolicy(("one", "two"))) as (client, _):
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401)):
            got = client.get("/v1/models", headers={"Authorization": f"bearer {key}".strip()})
            assert got.status_code == status


def test_nobody_can_name_the_salt_of_another():
    names = ["", "a", "b", cache_salt_of_key("one"), cache_salt_of_key("two"), cache_salt_of_key("one") + "a"]
    salts = {prepend_cache_salt([Request("r", [1], cache_salt=name)], cache_salt_of_key(key))[0].cache_salt
             for key in ("one", "two", "onea", "") for name in names}
    assert len(salts) == 4 * len(names)
    assert prepend_cache_salt([Request("r", [1], cache_salt="mine")], "")[0].cache_salt == "mine"


def known(client, key, **more):
    """How much of a prompt that is always the same was known."""
    body = {"prompt": "a prompt that both of them send", "max_tokens": 2, **more}
    got = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).json()
    return got["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("apart", [True, False])
def test_a_key_does_not_learn_what_another_sent(apart):
    with serving(access=AccessPolicy(("one", "two"), cache_salt_per_key=apart)) as (client, _):
        assert [known(client, "one"), known(client, "one")] == [0, 24]
        assert known(client, "two") == (0 if apart else 24)
        if apart:
            assert known(client, "two", cache_salt=cache_salt_of_key("one")) == 0
            assert known(client, "one", cache_salt="x") == 0
            assert known(client, "one", cache_salt="x") == known(client, "two") == 24


def test_a_key_stays_in_the_servers_own_process():
    """From the environment: its ranks do not inherit it, and nothing that it answers or says shows it."""
    command = [sys.executable, "-c", CODE.format(tp=1, drain=1, factory="fake", engine={})]
    with started(command, environment={**os.environ, API_KEY_VARIABLE: SECRET}) as (process, client):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"bearer {SECRET}"}).status_code == 200
        ranks = children(process.pid)
        assert ranks
        for rank in ranks:
            for what in ("environ", "cmdline"):
                assert SECRET.encode() not in Path(f"/proc/{rank}/{what}").read_bytes()
        with client.stream("GET", "/stats") as response:
            assert SECRET not in next(response.iter_lines())
        for path in ("/metrics", "/", "/v1/models", "/nothing"):
            assert SECRET not in client.get(path).text
        process.terminate()
        assert process.wait(30) == 0 and SECRET not in process.stderr.read()
