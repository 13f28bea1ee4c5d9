"""The process that answers HTTP, for a Hugging Face folder: soon there, small, and without torch."""
from pathlib import Path

import psutil
import pytest

from tests.model.chat_model import chat_model
from tests.serve.host import SERVE, started

SECONDS, BYTES = 2.5, 120e6                  # of the processor until it is ready; of memory then


@pytest.mark.prove
def test_the_api_process_of_a_folder_is_small_and_has_no_torch(tmp_path):
    folder = chat_model(tmp_path, "llama2 class")
    with started([*SERVE, str(folder), "--kv-memory", "1MiB"]) as (process, client):
        api = psutil.Process(process.pid)
        seconds, size = sum(api.cpu_times()[:2]), api.memory_info().rss
        chat = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
        child, = (each for each in api.children() if "templates" in " ".join(each.cmdline()))
        assert "torch" not in Path(f"/proc/{child.pid}/maps").read_text() and child.memory_info().rss < BYTES
    assert seconds <= SECONDS and size <= BYTES, (seconds, size)
    print(seconds, size)
