"""What needs a CUDA device: the same run there, and on two of them, is the run on the CPU."""
import subprocess
import sys

import pytest
import torch

from nanoinfra.train import metrics_and_plots

pytestmark = pytest.mark.gpu
FLAGS = ["--model", "test", "--data", "random", "--dtype", "float64", "--steps", "5", "--global-batch", "7",
         "--micro-batch", "2"]


@pytest.mark.parametrize("dp", [1, 2])
def test_losses_on_cuda_are_the_cpus(tmp_path, dp):
    if torch.cuda.device_count() < dp:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices, {dp} needed")
    lines = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        argv = ["train", *FLAGS, "--dp", str(dp), "--device", device, "--out", str(out)]
        subprocess.run([sys.executable, "-m", "nanoinfra.cli", *argv], check=True)
        lines[device] = metrics_and_plots.read_metrics(out / "metrics.jsonl")
    for want, got in zip(lines["cpu"], lines["cuda"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-8)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-8)
