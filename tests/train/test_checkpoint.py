import errno
import json
import os
import random
import resource
import shutil
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.train.checkpoint import safetensors_and_manifest as disk
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.checkpoint.save_and_load import (
    find_newest_checkpoint,
    list_checkpoints,
    load_shards,
    read_checkpoint_state,
    save_checkpoint,
    verify_checkpoint,
)
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError


class PowerCut(BaseException):
    """Not an Exception: nothing in the code under test may catch it and go on."""


class Line:
    """An axis whose ranks are threads of this process and meet at a barrier."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def meet(self, value):
        self.slots[self.rank] = json.dumps(value)
        self.barrier.wait(300)
        got = [json.loads(text) for text in self.slots]
        self.barrier.wait(300)
        return got


def catalog(folder):
    """{name: (full shape, dtype)} of every tensor in a checkpoint."""
    entries = disk.read_manifest(folder)["tensors"]
    return {name: (tuple(entry["shape"]), disk.torch_dtype_of_safetensors_name(entry["dtype"]))
            for name, entry in entries.items()}


def run(n, work):
    """`work(axis)` on n ranks; a list of what each returned or raised."""
    barrier, slots, out = threading.Barrier(n), [None] * n, [None] * n

    def body(rank):
        try:
            out[rank] = work(Line(rank, n, barrier, slots))
        except (Exception, PowerCut) as error:
            out[rank] = error
            if isinstance(error, PowerCut):
                barrier.abort()
    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


@pytest.fixture(autouse=True, scope="module")
def threads_meet():
    with pytest.MonkeyPatch.context() as patch:
        wire = save_and_load.comm.all_gather_json
        patch.setattr(save_and_load.comm, "all_gather_json", lambda value, axis, tag="":
                      axis.meet(value) if isinstance(axis, Line) else wire(value, axis, tag))
        yield


def bounds(total, n, r):
    return total * r // n, total * (r + 1) // n


def shards(name, shape, tp, zero, dim):
    """One piece a rank, tp counted fastest: ZeRO's rows of tensor parallelism's part along `dim`."""
    def piece(rank):
        whole = TensorShard.of_whole_tensor(name, shape)
        if not shape:
            return whole
        part = whole.slice_dim(dim, *bounds(shape[dim], tp, rank % tp))
        return part.slice_dim(0, *bounds(part.size[0], zero, rank // tp))
    return [piece(rank) for rank in range(tp * zero)]


def save_all(root, step, logical, n=2, keep=1, state=None):
    """Save whole tensors as n ranks would, each its rows; scalars on all of them."""
    def work(axis):
        held = {}
        for name, x in logical.items():
            piece = shards(name, x.shape, 1, n, 0)[axis.rank]
            held[piece] = x[piece.slices_within()]
        return save_checkpoint(root, step, held, state or {"step": step}, axis, keep)
    return run(n, work)


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(7, 3, generator=g), "adamw.exp_avg/w": torch.randn(7, 3, generator=g).double(),
            "half": torch.randn(5, generator=g).bfloat16(), "t": torch.tensor(seed)}


def load_all(folder):
    wanted = [TensorShard.of_whole_tensor(name, shape) for name, (shape, _) in catalog(folder).items()]
    return {piece.name: x for piece, x in load_shards(folder, wanted)}


def same(got, want):
    return got.keys() == want.keys() and all(
        got[name].dtype == x.dtype and torch.equal(got[name], x) for name, x in want.items())


def damaged(root):
    return [path.name for path in Path(root).iterdir() if path.suffix == ".tmp"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=3).map(tuple), st.data())
def test_any_mesh_reads_what_any_other_wrote(shape, data):
    want = torch.randn(shape, dtype=torch.float64)
    dim = st.integers(0, max(0, len(shape) - 1))
    before = shards("w", shape, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(dim))
    after = shards("w", shape, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(dim))
    with tempfile.TemporaryDirectory() as root:
        done = run(len(before), lambda axis: save_checkpoint(
            root, 1, {before[axis.rank]: want[before[axis.rank].slices_within()]}, {}, axis))
        assert done == [Path(root) / "step_00000001"] * len(before)
        got = torch.full(shape, torch.nan, dtype=torch.float64)
        for piece, x in load_shards(done[0], after):
            assert tuple(x.shape) == piece.size
            got[piece.slices_within()] = x
    assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("before, after", [((2, 2), (1, 3)), ((1, 3), (2, 2)), ((2, 2), (3, 1))])
def test_rows_of_rows_and_rows_of_columns_go_from_4_ranks_to_3_and_back(tmp_path, before, after, dim):
    names = ["blocks.0.attn.q.weight", "adamw.exp_avg/blocks.0.attn.q.weight"]
    logical = {name: torch.randn(11, 7) for name in names}
    cut = {name: shards(name, (11, 7), *before, dim) for name in names}
    n = before[0] * before[1]
    assert all(isinstance(path, Path) for path in run(n, lambda axis: save_checkpoint(
        tmp_path, 5, [(cut[k][axis.rank], x[cut[k][axis.rank].slices_within()]) for k, x in logical.items()],
        {"cursor": 40}, axis)))
    for name in names:
        for piece, got in load_shards(tmp_path / "step_00000005", shards(name, (11, 7), *after, dim)):
            assert torch.equal(got, logical[name][piece.slices_within()])
    assert read_checkpoint_state(tmp_path / "step_00000005") == {"cursor": 40}


def test_one_rank_needs_no_process_group(tmp_path):
    want = tensors(3)
    state = {"step": 2, "lr": 0.1 + 0.2, "config": {"data": "stdlib"}, "seed": 2**63}
    folder = save_checkpoint(tmp_path / "runs" / "a", 2,
                             {TensorShard.of_whole_tensor(name, x.shape): x for name, x in want.items()},
                             state, Mesh().world)
    assert folder == tmp_path / "runs" / "a" / "step_00000002" == find_newest_checkpoint(folder.parent)
    assert same(load_all(folder), want) and read_checkpoint_state(folder) == state
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "rank0.safetensors", "state.json"}
    assert catalog(folder)["half"] == ((5,), torch.bfloat16)


def save_on_a_rank(root, step, full_disk_on=None):
    axis, x = Mesh(dp=2).world, torch.arange(30.).reshape(10, 3)
    piece = shards("w", x.shape, 1, 2, 0)[axis.rank]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    effect = full if axis.rank == full_disk_on else disk.write_all_bytes
    with mock.patch.object(disk, "write_all_bytes", side_effect=effect):
        try:
            return str(save_checkpoint(root, step, {piece: x[piece.slices_within()]}, {"step": step}, axis))
        except CheckpointError as error:
            return str(error)


def test_real_ranks_save_and_agree_on_failure(tmp_path):
    ranks = pytest.importorskip("nanoinfra.distributed.pool.rank_pool").shared_rank_pool(2)
    first = tmp_path / "step_00000001"
    assert ranks.run(save_on_a_rank, tmp_path, 1) == [str(first)] * 2
    assert same(load_all(first), {"w": torch.arange(30.).reshape(10, 3)})
    got = ranks.run(save_on_a_rank, tmp_path, 2, full_disk_on=1)
    assert got == [f"cannot save step 2: rank 1: {tmp_path}/step_00000002.tmp/rank1.safetensors: No space "
                   f"left on device; the last good checkpoint is {first}"] * 2
    assert list(tmp_path.iterdir()) == [first]


def test_equal_pieces_are_written_once(tmp_path):
    x = torch.randn(6, 50)
    run(3,
        lambda axis: save_checkpoint(tmp_path, 1, [(TensorShard.of_whole_tensor("norm", x.shape), x)], {},
                                     axis))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "step_00000001").glob("*.safetensors"))]
    assert sizes[0] > x.nbytes and max(sizes[1:]) < 100
    assert same(load_all(tmp_path / "step_00000001"), {"norm": x})


def test_load_reads_only_the_ranges_it_needs(tmp_path, monkeypatch):
    x = torch.randn(12, 10)
    save_all(tmp_path, 1, {"w": x}, n=3)
    read, opened, real = [], [], save_and_load.safe_open

    class Spy:
        def __init__(self, path, framework):
            opened.append(Path(path).name)
            self.file = real(path, framework=framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, key):
            box = self.file.get_slice(key)

            class Counted:
                def __getitem__(self, index):
                    read.append(box[index].numel())
                    return box[index]
            return Counted()

    monkeypatch.setattr(save_and_load, "safe_open", Spy)
    piece = TensorShard.of_whole_tensor("w", x.shape).slice_dim(0, 2, 6).slice_dim(1, 3, 5)
    (_, got), = load_shards(tmp_path / "step_00000001", [piece])
    assert torch.equal(got, x[2:6, 3:5])
    assert opened == ["rank0.safetensors", "rank1.safetensors"] and read == [4, 4]


def test_load_verifies_unless_that_is_done(tmp_path, monkeypatch):
    save_all(tmp_path, 1, tensors(1))
    folder, calls = tmp_path / "step_00000001", []
    manifest = verify_checkpoint(folder)
    monkeypatch.setattr(save_and_load, "verify_checkpoint", lambda path: calls.append(path)
                        or verify_checkpoint(path))
    wanted = [TensorShard.of_whole_tensor("w", (7, 3))]
    assert same(dict((p.name, x) for p, x in load_shards(folder, wanted, json.loads(json.dumps(manifest)))),
                {"w": tensors(1)["w"]}) and not calls
    list(load_shards(folder, wanted))
    assert calls == [folder]


def test_what_is_not_in_the_checkpoint_is_named(tmp_path):
    save_all(tmp_path, 1, tensors(1))
    for piece, text in [(TensorShard.of_whole_tensor("v", (7, 3)), "no tensor 'v'"),
                        (TensorShard.of_whole_tensor("w", (7, 4)),
                         r"'w' has shape \[7, 3\], not the wanted \[7, 4\]")]:
        with pytest.raises(CheckpointError, match=text):
            list(load_shards(tmp_path / "step_00000001", [piece]))


class Disk:
    """Counts each operation that changes the disk, and at number `at` fails, or cuts the power.

    After a power cut, what was written and not fsynced is lost from a random byte on.
    """

    def __init__(self, patch, at=0, power_cut=False, stuck=False, seed=0):
        if not os.path.exists("/proc/self/fd"):
            pytest.skip("names what is synced through /proc/self/fd, which Linux has")
        self.at, self.power_cut, self.stuck, self.random = at, power_cut, stuck, random.Random(seed)
        self.lock, self.log, self.unsynced = threading.RLock(), [], set()
        self.real = {"mkdir": os.mkdir, "rename": os.rename, "fsync": os.fsync}
        self.rmtree, self.write_all = shutil.rmtree, disk.write_all_bytes
        for name in self.real:
            patch.setattr(os, name, lambda *a, _name=name, **k: self.do(_name, *a, **k))
        patch.setattr(shutil, "rmtree", self.remove)
        patch.setattr(disk, "write_all_bytes", self.write)

    def hit(self, *entry):
        """Log an operation; True where this one is the one to fail."""
        self.log.append(entry)
        late = len(self.log) > self.at > 0
        if late and self.power_cut:
            raise PowerCut
        return len(self.log) == self.at or (late and self.stuck)

    def fail(self, *path):
        if self.power_cut:
            raise PowerCut
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *path)      # mkdir and rename name the path

    def do(self, name, *args, **kwargs):
        with self.lock:
            what = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else os.fspath(args[0])
            if self.hit(name, Path(what).name):
                self.fail(*() if name == "fsync" else (what,))
            if name == "fsync":
                self.unsynced.discard(os.fstat(args[0]).st_ino)
            return self.real[name](*args, **kwargs)

    def write(self, file, data):
        with self.lock:
            self.unsynced.add(os.fstat(file.fileno()).st_ino)
            if self.hit("write", Path(file.name).name):
                self.write_all(file, memoryview(data)[:self.random.randint(0, len(data))])
                self.fail()
            self.write_all(file, data)

    def remove(self, folder, **kwargs):
        with self.lock:
            if self.hit("remove", folder.name) and self.power_cut:
                for path in folder.iterdir():
                    if self.random.random() < 0.5:
                        path.unlink()
                raise PowerCut
            self.rmtree(folder, **kwargs)

    def lose_unsynced(self, root):
        for path in Path(root).rglob("*"):
            if path.stat().st_ino in self.unsynced:
                os.truncate(path, self.random.randint(0, path.stat().st_size))


def operations(root, second_step, n):
    """How many operations the second save of a run takes, and their log."""
    save_all(root, 1, tensors(1), n)
    with pytest.MonkeyPatch.context() as patch:
        watch = Disk(patch)
        save_all(root, second_step, tensors(2), n)
    return watch.log


@pytest.mark.parametrize("second_step", [2, 1], ids=["next step", "same step again"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_power_cut_at_any_operation_leaves_a_good_checkpoint(tmp_path, second_step, n):
    log = operations(tmp_path / "clean", second_step, n)
    assert {name for name, _ in log} == {"mkdir", "write", "fsync", "rename", "remove"}
    seen = set()
    for at in range(1, len(log) + 1):
        root = tmp_path / str(at)
        save_all(root, 1, tensors(1), n)
        with pytest.MonkeyPatch.context() as patch:
            machine = Disk(patch, at, power_cut=True, seed=at)
            out = save_all(root, second_step, tensors(2), n)
        assert any(isinstance(error, PowerCut) for error in out)
        machine.lose_unsynced(root)
        refused = []
        got = load_all(find_newest_checkpoint(root, warn=refused.append))
        which = [seed for seed in (1, 2) if same(got, tensors(seed))]
        assert len(which) == 1 and refused == [], f"{at}: {log[at - 1]}"
        seen.add(which[0])
        assert all(isinstance(path, Path) for path in save_all(root, 3, tensors(3), n))
        assert [path.name for path
                in root.iterdir()] == ["step_00000003"] and find_newest_checkpoint(root) is not None
    assert seen == {1, 2}


@pytest.mark.parametrize("second_step", [2, 1], ids=["next step", "same step again"])
@pytest.mark.parametrize("stuck", [False, True], ids=["once", "from then on"])
def test_a_full_disk_at_any_operation_is_one_line_and_spares_the_last(tmp_path, stuck, second_step):
    log = operations(tmp_path / "clean", second_step, 2)
    for at in [i + 1 for i, (name, _) in enumerate(log) if name != "remove"]:
        root = tmp_path / str(at)
        save_all(root, 1, tensors(1))
        with pytest.MonkeyPatch.context() as patch:
            full = Disk(patch, at, stuck=stuck)
            first, other = save_all(root, second_step, tensors(2))
        name, file = full.log[at - 1]
        assert isinstance(first, CheckpointError) and str(first) == str(other)
        text = str(first)
        for part in (f"cannot save step {second_step}: rank ", "No space left on device", "\n"):
            assert (part in text) == (part != "\n"), text
        assert stuck or file in text
        good = find_newest_checkpoint(root)
        assert text.endswith(f"the last good checkpoint is {good}")
        got = load_all(good)
        assert same(got, tensors(1)) or same(got, tensors(2))
        if name in ("write", "mkdir") and second_step == 2:
            assert [path.name for path in list_checkpoints(root)] == ["step_00000001"]
        assert damaged(root) == []
        assert all(isinstance(path, Path) for path in save_all(root, 3, tensors(3)))


def test_files_are_durable_before_the_name_and_old_ones_go_last(tmp_path):
    log = operations(tmp_path, 2, 2)
    renamed = log.index(("rename", "step_00000002.tmp"))
    files = ["rank0.safetensors", "rank1.safetensors", "state.json", "manifest.json"]
    synced = [log.index(("fsync", name)) for name in files]
    for name, place in zip(files, synced):
        assert max(i for i, entry in enumerate(log) if entry == ("write", name)) < place
    assert max(synced[:3]) < log.index(("write", "manifest.json")) < synced[3]
    assert synced[3] < log.index(("fsync", "step_00000002.tmp")) < renamed
    assert renamed < log.index(("fsync", tmp_path.name)) < log.index(("rename", "step_00000001"))


def test_a_file_size_limit_is_an_error_and_not_a_signal(tmp_path):
    save_all(tmp_path, 1, tensors(1), n=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, 2, {TensorShard.of_whole_tensor("w", (9999,)): torch.zeros(9999)}, {},
                            Mesh().world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "rank 0: " in str(caught.value) and "rank0.safetensors: File too large" in str(caught.value)
    assert str(caught.value).endswith(f"is {tmp_path / 'step_00000001'}") and damaged(tmp_path) == []


def test_a_flip_of_a_bit_in_any_byte_is_refused_by_name(tmp_path):
    save_all(tmp_path, 1, {"w": torch.randn(3, 2), "t": torch.tensor(1)})
    flips = random.Random(7)
    for path in sorted((tmp_path / "step_00000001").iterdir()):
        good = path.read_bytes()
        for place in range(flips.randrange(3), len(good), 3):
            bad = bytearray(good)
            bad[place] ^= 1 << flips.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{path.name}: is altered"):
                verify_checkpoint(path.parent)
        path.write_bytes(good)
    verify_checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize("name", ["rank0.safetensors", "rank1.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm, reason", [("truncate", "truncated"), ("grow", "too long|altered"),
                                          ("delete", "missing"), ("folder", "Is a directory")])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, name, harm, reason):
    save_all(tmp_path, 1, tensors(1), keep=2)
    save_all(tmp_path, 2, tensors(2), keep=2)
    path = tmp_path / "step_00000002" / name
    whole = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "delete":
        path.write_bytes(whole[:len(whole) // 3] if harm == "truncate" else whole + b"\0")
    refused = []
    assert find_newest_checkpoint(tmp_path, warn=refused.append) == tmp_path / "step_00000001"
    assert len(refused) == 1 and refused[0].startswith("refused checkpoint step_00000002: ")
    with pytest.raises(CheckpointError, match=f"step_00000002/{name}: .*({reason})"):
        list(load_shards(tmp_path / "step_00000002", [TensorShard.of_whole_tensor("w", (7, 3))]))


@pytest.mark.parametrize("parts, reason", [([(0, 3)], "hold 3 of its 4"), ([(0, 3), (2, 4)], "overlap")])
def test_a_manifest_whose_pieces_do_not_make_the_tensor_is_refused(tmp_path, parts, reason):
    save_all(tmp_path, 1, {"w": torch.zeros(4)}, n=1)
    folder = tmp_path / "step_00000001"
    manifest = disk.read_manifest(folder)
    manifest["tensors"]["w"]["pieces"] = [
        {"file": "rank0.safetensors", "offset": [a], "size": [b - a]} for a, b in parts]
    (folder / "manifest.json").write_bytes(disk.serialize_manifest(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json: tensor w: .*{reason}"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("make, reason", [
    (lambda w, r: (w.slice_dim(0, 0, 2 - r), torch.zeros(2 - r)),
     r"the pieces w\[0:2\] and w\[0:1\] overlap"),
    (lambda w, r: (w.slice_dim(0, r, 1 + r), torch.zeros(1)), "tensor w: the pieces hold 2 of its 4"),
    (lambda w, r: (w, torch.zeros(4, dtype=[torch.float32, torch.float64][r])), "rank 1 holds it as F64"),
    (lambda w, r: (w.slice_dim(0, 2 * r, 2 * r + 2), torch.zeros(2 + r)), r"w\[2:4\]: a tensor of shape"),
])
def test_ranks_that_disagree_all_raise_the_same(tmp_path, make, reason):
    out = run(2,
              lambda axis: save_checkpoint(tmp_path, 1,
                                           [make(TensorShard.of_whole_tensor("w", (4,)), axis.rank)], {},
                                           axis))
    assert isinstance(out[1], CheckpointError) and str(out[0]) == str(out[1])
    with pytest.raises(CheckpointError, match=f"cannot save step 1: .*{reason}.*; there is no good"):
        raise out[0]
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_json_cannot_hold_is_refused(tmp_path):
    out = save_all(tmp_path, 1, tensors(1), state={"seen": {1, 2}})
    assert all("Object of type set is not JSON serializable" in str(error) for error in out)


def test_the_newest_k_are_kept_and_unfinished_ones_go(tmp_path):
    (tmp_path / "step_00000000.tmp").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    for step in range(1, 6):
        save_all(tmp_path, step, tensors(step), keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_0000000{step}" for step in (3, 4, 5)]
    assert damaged(tmp_path) == [] and (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, 6, {}, {}, Mesh().world, keep=0)


def test_a_save_never_deletes_itself_or_what_is_newer(tmp_path):
    for step in (8, 9, 4):
        save_all(tmp_path, step, tensors(step), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000009"]


def test_the_same_step_is_replaced(tmp_path):
    for seed in (1, 2, 3):
        save_all(tmp_path, 7, tensors(seed), keep=2)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]
        assert same(load_all(tmp_path / "step_00000007"), tensors(seed))


def test_a_root_that_cannot_be_used_is_one_line(tmp_path):
    assert find_newest_checkpoint(tmp_path / "none") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: Not a directory"):
        find_newest_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="rank 0: .*file.*: (Not a directory|File exists)"):
        save_checkpoint(tmp_path / "file", 1, {}, {}, Mesh().world)


def test_what_has_an_old_checkpoints_name_ends_no_save_and_loses_nothing(tmp_path):
    """A link to another run's, one to nowhere, a file, at the name of an old one, of this, of its rest."""
    root, theirs = tmp_path / "root", tmp_path / "theirs"
    save_all(theirs, 1, tensors(1))
    root.mkdir()
    (root / "step_00000001").symlink_to(theirs / "step_00000001")
    (root / "step_00000002.tmp").symlink_to(theirs / "step_00000001")
    (root / "step_00000003").symlink_to("nowhere")
    for name in ("step_00000002", "step_00000004", "step_00000005.tmp"):
        (root / name).write_text(name)
    for step in range(2, 7):
        assert save_all(root, step, tensors(step)) == [root / f"step_0000000{step}"] * 2
    assert same(load_all(theirs / "step_00000001"), tensors(1))
    assert list_checkpoints(root) == [root / "step_00000006"]
    files = {path.read_text() for path in root.iterdir() if path.is_file()}
    assert files == {"step_00000002", "step_00000004", "step_00000005.tmp"}


def test_what_cannot_be_deleted_is_said_and_left(tmp_path, monkeypatch):
    real, said = shutil.rmtree, []

    def rmtree(path, **more):
        if "step_00000001" in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, **more)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for step in (1, 2, 3, 1, 1, 4):
        assert save_checkpoint(tmp_path, step, {}, {}, Mesh().world, keep=1, warn=said.append).exists()
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000004"]
    assert set(said) == {f"cannot delete {tmp_path}/{name}: Permission denied; the run goes on without that"
                         for name in ("step_00000001.tmp", "step_00000001.old.tmp")}


def test_a_whole_checkpoint_of_another_version_is_neither_refused_as_bad_nor_passed_over(tmp_path):
    for step in (1, 2):
        save_all(tmp_path, step, tensors(step), keep=2)
    path = tmp_path / "step_00000002" / "manifest.json"
    body = json.loads(path.read_bytes())
    path.write_bytes(disk.serialize_manifest({**body, "format": "nanoinfra checkpoint 2"}))
    says = "'nanoinfra checkpoint 2', and this version of nanoinfra reads 'nanoinfra checkpoint 1'; go on"
    with pytest.raises(disk.CheckpointVersionError, match=says):
        find_newest_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"checkpoint 2", b"checkpoint 3"))        # sealed otherwise
    refused = []
    assert find_newest_checkpoint(tmp_path, warn=refused.append) == tmp_path / "step_00000001"
    assert "is altered" in refused[0]
    assert "or of another version: its format is 'nanoinfra checkpoint 3'" in refused[0]
    next(iter(body["tensors"].values()))["dtype"] = "F8_E4M3"
    path.write_bytes(disk.serialize_manifest(body))
    with pytest.raises(disk.CheckpointVersionError, match="holds tensors of F8_E4M3"):
        find_newest_checkpoint(tmp_path)


def test_a_reader_beside_a_run_that_lets_checkpoints_go(tmp_path, monkeypatch):
    save_all(tmp_path, 1, tensors(1))
    old, said = verify_checkpoint(tmp_path / "step_00000001"), []

    def slowly(folder):
        if folder.name == "step_00000001":
            save_all(tmp_path, 2, tensors(2))                              # meanwhile
        return verify_checkpoint(folder)
    monkeypatch.setattr(save_and_load, "verify_checkpoint", slowly)
    assert find_newest_checkpoint(tmp_path, warn=said.append) == tmp_path / "step_00000002" and said == []
    with pytest.raises(CheckpointError, match="rank0.safetensors: is gone: .* start again"):
        list(load_shards(tmp_path / "step_00000001", [TensorShard.of_whole_tensor("w", (7, 3))], old))
