"""Describe this machine: processor, cores, memory, GPUs and their links, software versions."""
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nanoinfra.distributed.cpu_threads import usable_cpu_cores

BYTES_PER_GIB = 2 ** 30


def describe_host() -> dict:
    """{"name", "processor", "cores", "memory" in bytes, "load", "gpus": [{"name", "memory"}], "versions"}."""
    return {"name": platform.node(), "processor": processor_name(), "cores": usable_cpu_cores(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load": os.getloadavg()[0],
            "gpus": _gpus(), "versions": software_versions()}


def processor_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def software_versions() -> dict[str, str]:
    """{"python", "torch", "triton", "cuda"}: each one's version, "none" for what is not installed."""
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
            "cuda": torch.version.cuda or "none"}


def gpu_links() -> list[str]:
    """The link between each two GPUs of this host, as "0-1 NV18". [] for one GPU, or without nvidia-smi."""
    if torch.cuda.device_count() < 2 or not shutil.which("nvidia-smi"):
        return []
    told = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True)
    return parse_gpu_topology(told.stdout) if told.returncode == 0 else []


def parse_gpu_topology(text: str) -> list[str]:
    """Parse the matrix that `nvidia-smi topo -m` prints into ["0-1 NV18", ...]."""
    rows = [line.split() for line in text.splitlines() if line.startswith("GPU")]
    return [f"{i}-{j} {rows[i][1 + j]}" for i in range(len(rows)) for j in range(i + 1, len(rows))]


def _gpus():
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory": p.total_memory} for p in properties]


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
