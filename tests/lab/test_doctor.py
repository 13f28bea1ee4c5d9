"""What `nanoinfra doctor` prints and writes, on one rank and on two."""
import json
import subprocess
import sys

import pytest

from nanoinfra.cli import main
from nanoinfra.lab.doctor import machine_info as devices
from nanoinfra.lab.doctor.doctor_flags import DoctorFlags
from nanoinfra.lab.doctor.measure_machine import run_doctor
from nanoinfra.lab.measure import Measurement

QUICK = (("nanoinfra.distributed.measure_links_and_matmul", "_PAYLOAD_SIZES_BYTES", (4096, 65536)),
         ("nanoinfra.distributed.measure_links_and_matmul", "_MAX_CALL_SECONDS", 0.05))


def test_two_ranks_report_alike_and_the_first_writes(ranks, tmp_path):
    out = tmp_path / "doctor.json"
    flags = DoctorFlags(dp=2, threads=1, out=out)
    first, second = ranks(2).run(run_doctor, flags, mutants=QUICK)
    assert first["wires"] == second["wires"] and first["hosts"] == second["hosts"]
    got = json.loads(out.read_text())
    wire = got["wires"]["dp"]
    assert list(got["wires"]) == ["dp"] and list(wire["seconds"]) == ["4096", "65536"]
    assert [host["ranks"] for host in got["hosts"]] == [[0, 1]] and got["ranks"] == 2
    numbers = [*got["matmul"].values(), wire["latency"], wire["bandwidth"], *wire["seconds"].values()]
    assert [Measurement(**m).unit for m in numbers] == ["FLOP/s", "FLOP/s", "s", "B/s", "s", "s"]
    for m in numbers:
        assert m["kind"] == "timed" and m["n"] == 7 and "cores" in m["machine"] and m["spread"] >= 0
        assert m["value"] >= 0


@pytest.mark.timed
def test_an_emulated_wire_comes_out_as_given(ranks):
    flags = DoctorFlags(pp=2, threads=1, emulate_link=("pp=0.004,1e8",))
    report, _ = ranks(2).run(run_doctor, flags, mutants=QUICK)
    assert report["wires"]["pp"]["emulated"] and report["wires"]["pp"]["op"] == "send"
    assert report["wires"]["pp"]["latency"]["value"] == pytest.approx(0.004, rel=0.1)


def test_it_prints_tables_a_person_reads(ranks, capsys):
    ranks(2).run(run_doctor, DoctorFlags(tp=2, threads=1), mutants=QUICK)
    said = capsys.readouterr().out
    for words in ("2 ranks", "versions", "measured peak", "bfloat16", "1 thread, one of 2 ranks",
                  "tp: 2 ranks, 2 sizes of all-reduce", "alpha", "beta", "timed, median of 7"):
        assert words in said, said


def test_one_rank_has_no_wires(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanoinfra.distributed.measure_links_and_matmul._MAX_CALL_SECONDS", 0.0)
    assert main(["doctor", "--threads", "1", "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["wires"] == {}
    assert "alpha" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, says", [
    (["--nproc", "3", "--tp", "2"], "try"), (["--threads", "0"], "give at least 1"),
    (["--emulate-link", "dp=fast"], "dp=20e-6,1e9"), (["--out", "nowhere/doctor.json"], "make it first")])
def test_a_mistake_is_one_line(argv, says, capsys):
    assert main(["doctor", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanoinfra: ") and says in said and said.count("\n") == 1


@pytest.mark.prove
def test_it_starts_its_own_ranks(tmp_path):
    argv = ["doctor", "--nproc", "2", "--out", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, "-m", "nanoinfra.cli", *argv], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["wires"]["dp"]["ranks"] == 2


TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tSYS\tPIX\t0-55\t0
GPU1\tNV18\t X \tSYS\tSYS\t0-55\t0
GPU2\tSYS\tSYS\t X \tSYS\t56-111\t1
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""


def test_links_between_gpus():
    assert devices.parse_gpu_topology(TOPOLOGY) == ["0-1 NV18", "0-2 SYS", "1-2 SYS"]
