# SPDX-License-Identifier: Apache-2.0
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from meft_ds.offload.host.shared_memory import TensorSpec, allocate, arena_bytes, remove_stale
from meft_ds.offload.ranks import Ranks
from tests.ranks import run_ranks, start_ranks

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from meft_ds.offload.host.shared_memory import TensorSpec, allocate
from meft_ds.offload.ranks import Ranks

dist.init_process_group("gloo")
ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), group=dist.group.WORLD)
directory = Path(sys.argv[1])
specs = {"a": TensorSpec((5, 3), torch.float32), "b": TensorSpec((7,), torch.bfloat16)}
t = allocate(specs, ranks, directory=directory)
assert list(directory.iterdir()) == [], "the file must be gone as soon as everybody has mapped it"
if ranks.rank == 0:
    t["a"].fill_(3.0)
dist.barrier()
assert t["a"].sum() == 45 and t["b"].sum() == 0
dist.barrier()
if ranks.rank == 1:
    t["b"].fill_(2.0)
dist.barrier()
assert t["b"].float().sum() == 14
print("shared")
if len(sys.argv) > 2:
    sys.stdout.flush()
    time.sleep(60)
dist.barrier()
ranks = None
dist.destroy_process_group()  # else gloo threads that run while the interpreter ends may abort it
"""

LOCKED = """
import ctypes, gc, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from meft_ds.offload.host import shared_memory
from meft_ds.offload.ranks import Ranks

dist.init_process_group("gloo")
ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), group=dist.group.WORLD)
directory, fails = Path(sys.argv[1]), sys.argv[2] == "fails"
locked, seen = {}, []

def mapped():
    return [line for line in open("/proc/self/maps") if str(directory) in line]

def register(address, nbytes):
    if fails and ranks.rank == 1 and locked:
        return 2
    locked[address] = nbytes
    return 0

def unregister(address):
    assert mapped()
    seen.append(ctypes.string_at(address, 1))  # a fault, were it unmapped
    del locked[address]

shared_memory._register, shared_memory._unregister = register, unregister
torch.cuda.is_available, torch.cuda.current_device, torch.cuda.synchronize = lambda: True, lambda: 0, lambda d: None
specs = {"a": ((5, 3), torch.float32), "b": ((5000,), torch.uint8, True), "c": ((4,), torch.uint8, True)}
specs = {name: shared_memory.TensorSpec(*spec) for name, spec in specs.items()}
try:
    t = shared_memory.allocate(specs, ranks, directory=directory)
except ValueError as e:
    print(e)
else:
    assert sorted(locked.values()) == [4, 5000] and mapped()
    t["b"].fill_(7), t["c"].fill_(7)
    part = t["c"][1:]
    t.clear()
    gc.collect()
    assert len(locked) == 2, "somebody still uses it"
    del part
    gc.collect()
    print(seen == [bytes([7])] * 2)
assert not locked and not mapped()
dist.barrier()
ranks = None
dist.destroy_process_group()
"""


def test_one_rank_gets_private_zeroed_memory(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((4, 2), torch.float32), "b": TensorSpec((3,), torch.bfloat16)}
    t = allocate(specs, Ranks(), directory=tmp_path)
    assert t["a"].shape == (4, 2) and t["b"].dtype == torch.bfloat16 and t["a"].sum() == 0
    assert list(tmp_path.iterdir()) == []
    assert arena_bytes(specs) == 2 * 4096


def test_ranks_share_one_block_and_leave_no_file(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    (shm := tmp_path / "shm").mkdir()
    assert run_ranks(script, 2, str(shm)) == ["shared\n"] * 2
    assert list(shm.iterdir()) == []


def plant_strays(shm: Path) -> set[Path]:
    """What anybody may leave in /dev/shm, under names like ours."""
    me, dead, token = os.getuid(), 2**31 - 1, "0" * 16
    (shm / f"meft-ds-{me}-x").touch()
    (shm / f"meft-ds-{me}-").touch()
    (shm / f"meft-ds-{me}-{dead}-1-abc").touch()
    (shm / f"meft-ds-{me}-\u0663-1-{token}").touch()
    (shm / f"meft-ds-{me}-{'9' * 30}-1-{token}").touch()
    (shm / f"meft-ds-{me}-{dead}-1-{token}").mkdir()
    (shm / f"meft-ds-{me}-{dead}-2-{token}").symlink_to(shm / f"meft-ds-{me}-x")
    (shm / f"meft-ds-{me}-{dead}-3-{token}").symlink_to(shm / "nowhere")
    os.mkfifo(shm / f"meft-ds-{me}-{dead}-4-{token}")
    os.close(os.open(bytes(shm / f"meft-ds-{me}-") + b"\xff", os.O_CREAT))
    return set(shm.iterdir())


def test_files_that_a_start_did_not_make_neither_stop_it_nor_are_removed(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SCRIPT.replace("list(directory.iterdir()) == []", "len(list(directory.iterdir())) == 10"))
    (shm := tmp_path / "shm").mkdir()
    strays = plant_strays(shm)
    assert len(strays) == 10 and remove_stale(shm) == []
    assert run_ranks(script, 2, str(shm)) == ["shared\n"] * 2
    assert set(shm.iterdir()) == strays
    assert remove_stale(shm / "nowhere") == []


def test_a_leftover_that_cannot_be_removed_stays_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"meft-ds-{os.getuid()}-{2**31 - 1}-1-{'0' * 16}"
    left.touch()

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        assert remove_stale(tmp_path) == [] and left.exists()
    assert remove_stale(tmp_path) == [left.name] and not left.exists()


def test_whatever_the_first_rank_fails_on_is_told_to_every_rank(tmp_path: Path) -> None:
    fails = """
from meft_ds.offload.host import shared_memory
def make(directory):
    raise RuntimeError("planted")
shared_memory._make_nameless = make
"""
    caught = """
try:
    t = allocate(specs, ranks, directory=directory)
except ValueError as e:
    print("planted" in str(e), flush=True)
    dist.destroy_process_group()
    os._exit(0)
"""
    line = "t = allocate(specs, ranks, directory=directory)\n"
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT.replace("dist.init", fails + "dist.init", 1).replace(line, caught))
    (shm := tmp_path / "shm").mkdir()
    assert run_ranks(script, 2, str(shm), timeout=60) == ["True\n"] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_shared_memory_is_unlocked_before_it_is_unmapped_and_a_rank_that_cannot_lock_it_fails_all(
    tmp_path: Path, fails: bool
) -> None:
    """CUDA's calls are stood in for: a CPU has nothing to lock."""
    script = tmp_path / "locked.py"
    script.write_text(LOCKED)
    (shm := tmp_path / "shm").mkdir()
    first, second = run_ranks(script, 2, str(shm), "fails" if fails else "works")
    assert first == second
    assert ("rank 1 could not page-lock" in first and "error 2" in first) if fails else first == "True\n"


def test_sigkill_of_every_rank_leaves_no_file(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    (shm := tmp_path / "shm").mkdir()
    processes = start_ranks(script, 2, str(shm), "sleep")
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "shared\n"
    for process in processes:
        process.kill()
        process.wait(timeout=30)
    assert list(shm.iterdir()) == []


def test_ranks_that_cannot_reach_a_nameless_file_share_a_named_one_and_leave_none(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    blind = "import meft_ds.offload.host.shared_memory as shared\n"
    blind += "shared._make_nameless = lambda d: (os.open(d, os.O_TMPFILE | 2), '/x')\n"
    script.write_text(SCRIPT.replace("dist.init", blind + "dist.init", 1))
    (shm := tmp_path / "shm").mkdir()
    assert run_ranks(script, 2, str(shm)) == ["shared\n"] * 2
    assert list(shm.iterdir()) == []


def test_file_of_a_start_killed_before_it_could_unlink_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from meft_ds.offload.host import shared_memory
from meft_ds.offload.ranks import Ranks
def hang(*a, **k):
    print("made", flush=True)
    time.sleep(60)
Ranks.from_first = hang
shared_memory._map(4096, Ranks(rank=0, world=2), Path(sys.argv[1]), shared_memory._make_named)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        (left,) = tmp_path.iterdir()
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
        assert remove_stale(tmp_path) == []  # its creator lives
        process.kill()
        process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while not remove_stale(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left.exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / f"meft-ds-{os.getuid() + 1}-1-1-abc"
    foreign.touch()
    assert remove_stale(tmp_path) == [] and foreign.exists()
