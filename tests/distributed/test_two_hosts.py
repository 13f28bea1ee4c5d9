"""A cable between two hosts: it costs what the formula says, and a host may be lost and come back."""
import json
import os
import subprocess

import pytest

from nanoinfra.cli import main
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.train import metrics_and_plots
from tests.distributed.two_hosts import RATE, NoRights, TwoHosts
from tests.processes import until
from tests.train.runs import FLAGS, close, lines

RUN = [*FLAGS, "--lr-schedule", "constant", "--lr", "1e-4", "--timeout", "5", "--save-every", "5"]


@pytest.fixture
def hosts():
    try:
        with TwoHosts() as pair:
            yield pair
    except NoRights as why:
        pytest.skip(f"two hosts cannot be rehearsed: {why}")


def alone(folder, steps):
    """The lines of one rank, undisturbed."""
    assert main([*RUN, "--steps", str(steps), "--out", str(folder)]) == 0
    return metrics_and_plots.read_metrics(folder / "metrics.jsonl")


class Both:
    """A run with a torchrun on each host; their words go to files."""

    def __init__(self, hosts, folder, nodes, steps):
        self.hosts, self.run, self.nodes = hosts, folder / "run", nodes
        self.said = [folder / "said0", folder / "said1"]
        self.argv = [*RUN, "--steps", str(steps), "--out", str(self.run)]
        self.processes = [self.begin(0), self.begin(1)]

    def begin(self, place):
        with open(self.said[place], "a") as said:
            return self.hosts.torchrun(place, self.nodes, self.argv, stdout=said, stderr=said)

    def until(self, steps):
        until(lambda: lines(self.run) >= steps, self)

    def opened(self) -> list[str]:
        """The first line of every attempt."""
        every = "".join(path.read_text() for path in self.said)
        return [line for line in every.splitlines() if line.startswith("test: ")]

    def poll(self):
        return self.processes[0].poll()

    def communicate(self):
        return None, "".join(path.read_text() for path in self.said)


def test_nothing_is_left_behind(hosts):
    """Not of hosts on which something runs, nor of those that could not be made."""
    sleeper = hosts.start(1, ["sleep", "100"])
    hosts._remove()
    assert sleeper.poll() is not None
    bad = TwoHosts(rate=0.0)
    with pytest.raises(NoRights, match="tbf"), bad:
        pass
    there = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for name in (*hosts.names, *bad.names, *hosts.cables, *bad.cables):
        assert name not in there and not os.path.exists(f"/run/netns/{name}")


@pytest.mark.prove
def test_the_cable_takes_what_the_formula_says(hosts, tmp_path):
    """doctor on both hosts: 200 Mbit/s come out of its fit, and of each large all-reduce."""
    out = tmp_path / "doctor.json"
    argv = ["doctor", "--dp", "2", "--threads", "1", "--out", str(out)]
    both = [hosts.torchrun(place, "2", argv) for place in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    got = json.loads(out.read_text())["wires"]["dp"]
    print(f"beta {got['bandwidth']['value'] / 1e6:.2f} MB/s of {RATE / 1e6:.0f}")
    assert got["bandwidth"]["value"] == pytest.approx(RATE, rel=0.25)
    large = {int(size): m["value"] for size, m in got["seconds"].items() if int(size) >= 1 << 20}
    assert len(large) >= 2
    for size, seconds in large.items():
        want = ring_collective_seconds("all_reduce", size, 2, got["latency"]["value"], RATE)
        print(f"{size} bytes: {seconds:.4f} s, formula {want:.4f} s")
        assert seconds == pytest.approx(want, rel=0.25)


@pytest.mark.prove
def test_two_hosts_train_as_one_rank(hosts, tmp_path):
    want = alone(tmp_path / "alone", 10)
    both = Both(hosts, tmp_path, "2", 10)
    assert [process.wait() for process in both.processes] == [0, 0], both.communicate()[1]
    assert len(both.opened()) == 1 and "dp=2" in both.opened()[0]
    assert both.communicate()[1].count("ranks on several hosts trust their network") == 1
    close(metrics_and_plots.read_metrics(both.run / "metrics.jsonl"), want)


@pytest.mark.prove
@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_a_lost_host(hosts, tmp_path, how):
    """Killed, its kernel says so; unplugged, nobody does, and a collective runs out of time."""
    want = alone(tmp_path / "alone", 150)
    both = Both(hosts, tmp_path, "1:2", 150)
    both.until(40)
    if how == "unplugged":
        hosts.unplug()
    hosts.kill(1)
    assert both.processes[0].wait() == 0, both.communicate()[1]
    first, second = both.opened()
    assert "dp=2" in first and "dp=1" in second
    assert int(second.rpartition("after step ")[2]) >= 35
    assert ("imed out" in both.said[0].read_text()) == (how == "unplugged")
    close(metrics_and_plots.read_metrics(both.run / "metrics.jsonl"), want)
    assert not hosts.processes(0) and not hosts.processes(1)


@pytest.mark.prove
def test_a_lost_host_that_comes_back(hosts, tmp_path):
    want = alone(tmp_path / "alone", 600)
    both = Both(hosts, tmp_path, "1:2", 600)
    both.until(40)
    hosts.kill(1)
    both.until(100)
    both.processes[1] = both.begin(1)
    assert [process.wait() for process in both.processes] == [0, 0], both.communicate()[1]
    assert [line.partition("cp=")[0][-6:-2] for line in both.opened()] == ["dp=2", "dp=1", "dp=2"]
    close(metrics_and_plots.read_metrics(both.run / "metrics.jsonl"), want)
