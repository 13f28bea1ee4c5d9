"""The threads that read requests: what they have freed is given back."""
import subprocess
import sys

from tests.serve.host import ROOT

FILL = """
from nanoinfra.serve.server.preprocess_requests import RequestPreprocessor
threads = RequestPreprocessor()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
def fill():
    for _ in range(3):
        bytearray(b"x") * (24 << 20)
before = resident()
for pool in threads.thread_pools.values():
    pool.submit(fill).result()
threads.close()
print(resident() - before)
"""


def test_threads_keep_no_memory_that_they_have_freed():
    """glibc's own thresholds would keep some 24 MB in each of the four."""
    got = subprocess.run([sys.executable, "-c", FILL], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(got.stdout) < 8 << 20
