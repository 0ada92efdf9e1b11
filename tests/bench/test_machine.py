"""What the machine is, read from a made-up system, and its roofs."""

import json
import subprocess
import sys

import pytest
import torch

from writehead.bench import machine as machines
from writehead.bench.machine import Roofs, git_state, machine, matmul_rate, read_bandwidth, roofline_seconds
from writehead.core import system

MEBI = 2**20
ROOFS = Roofs({16 * MEBI: 40e9, 64 * MEBI: 20e9}, {"float32": {1: 5e9, 2048: 100e9}}, 2)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An empty /proc, control groups and processors; a function writes files into them."""
    for name in ("PROC", "CGROUP", "CPUS"):
        monkeypatch.setattr(system, name, tmp_path / name)
        (tmp_path / name).mkdir()
    monkeypatch.setattr(system, "allowed_cpus", lambda: {0, 1, 2, 3})

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def topology(write, cores):
    for cpu, core in enumerate(cores):
        write(f"CPUS/cpu{cpu}/topology/physical_package_id", "0\n")
        write(f"CPUS/cpu{cpu}/topology/core_id", f"{core}\n")


def test_a_silent_system_is_unknown(fake):
    assert system.available_memory() is None
    assert system.total_memory() is None
    assert system.caches() is None
    assert system.instruction_sets() is None
    assert system.busy_seconds() is None
    assert system.own_seconds() is None
    assert system.cpu_quota() is None


def test_two_threads_of_one_core_count_once(fake):
    topology(fake, [0, 0, 1, 1])
    assert system.cores() == 2


def test_the_quota_of_any_enclosing_group_limits_the_cores(fake):
    topology(fake, [0, 1, 2, 3])
    fake("PROC/self/cgroup", "0::/a/b\n")
    fake("CGROUP/a/b/cpu.max", "max 100000\n")
    fake("CGROUP/a/cpu.max", "150000 100000\n")
    assert system.cpu_quota() == 1.5
    assert system.cores() == 2


def test_the_first_generation_of_groups_is_read_too(fake):
    topology(fake, [0, 1, 2, 3])
    fake("PROC/self/cgroup", "4:memory:/m\n3:cpu,cpuacct:/c\n")
    fake("CGROUP/cpu,cpuacct/c/cpu.cfs_quota_us", "100000\n")
    fake("CGROUP/cpu,cpuacct/c/cpu.cfs_period_us", "100000\n")
    fake("CGROUP/memory/m/memory.limit_in_bytes", "4000000\n")
    fake("CGROUP/memory/m/memory.usage_in_bytes", "1000000\n")
    fake("CGROUP/memory/memory.limit_in_bytes", "9223372036854771712\n")
    fake("CGROUP/memory/memory.usage_in_bytes", "1000000\n")
    fake("PROC/meminfo", "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    assert system.cores() == 1
    assert system.total_memory() == 4_000_000
    assert system.available_memory() == 3_000_000


def test_file_cache_inside_a_group_counts_as_free(fake):
    fake("PROC/self/cgroup", "0::/a\n")
    fake("CGROUP/a/memory.max", "4000000\n")
    fake("CGROUP/a/memory.current", "3500000\n")
    fake("CGROUP/a/memory.stat", "anon 1500000\ninactive_file 2000000\n")
    fake("PROC/meminfo", "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    assert system.available_memory() == 2_500_000


def test_without_groups_the_machine_limits_the_memory(fake):
    fake("PROC/meminfo", "MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable: 6000 kB\n")
    assert (system.total_memory(), system.available_memory()) == (8_192_000, 6_144_000)


def test_caches_are_named_by_level_and_kind(fake):
    for index, (level, kind, size) in enumerate([(1, "Data", "32K"), (2, "Unified", "2M")]):
        for name, text in (("level", level), ("type", kind), ("size", size)):
            fake(f"CPUS/cpu0/cache/index{index}/{name}", f"{text}\n")
    assert system.caches() == {"L1d": 32768, "L2": 2 * MEBI}


def test_instruction_sets_are_whole_words_of_the_flags(fake):
    fake("PROC/cpuinfo", "model name\t: Some CPU @ 3GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni_x\n")
    sets = system.instruction_sets()
    assert (sets["avx2"], sets["avx512f"], sets["avx512_vnni"]) == (True, True, False)
    assert system.cpu_model() == "Some CPU @ 3GHz"


def test_the_allowed_processors_count_as_busy_while_they_work_or_their_host_is_elsewhere(fake, monkeypatch):
    monkeypatch.setattr(system, "allowed_cpus", lambda: {0})
    monkeypatch.setattr(system.os, "sysconf", lambda name: 100)
    fake("PROC/stat", "cpu  9 9 9 9 9 9 9 0\ncpu0 100 200 300 999 999 40 60 50\ncpu1 1 1 1 1 1 1 1 0\n")
    assert system.busy_seconds() == 7.5


def test_the_machine_is_described_in_json():
    described = json.loads(json.dumps(machine()))
    assert described["cores"] >= 1
    assert described["threads"] == torch.get_num_threads()
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["python"] == ".".join(str(part) for part in sys.version_info[:3])


def test_the_source_tree_tells_its_commit_and_whether_it_differs(tmp_path):
    assert git_state(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e"]
    (tmp_path / "writehead").mkdir()
    (tmp_path / "writehead" / "a.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    (tmp_path / "result.json").write_text("{}")
    assert git_state(tmp_path) == (head.strip(), False), "a file outside the package changes nothing"
    (tmp_path / "writehead" / "a.py").write_text("a = 2\n")
    assert git_state(tmp_path) == (head.strip(), True)


@pytest.mark.parametrize(("size", "rate"), [(1, 40e9), (16, 40e9), (40, 30e9), (64, 20e9), (500, 20e9)])
def test_bandwidth_is_linear_between_what_was_measured(size, rate):
    assert ROOFS.bandwidth_at(size * MEBI) == pytest.approx(rate)


def test_the_roof_is_the_slower_of_moving_and_multiplying():
    assert roofline_seconds(20e9, 1e9, ROOFS, 64 * MEBI) == pytest.approx(1.0)
    assert roofline_seconds(20e9, 300e9, ROOFS, 64 * MEBI) == pytest.approx(3.0)
    assert roofline_seconds(20e9, 1e9, ROOFS, 16 * MEBI) == pytest.approx(0.5)


def test_a_type_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match="dtype='int8' was not measured; measured: float32"):
        roofline_seconds(1, 1, ROOFS, MEBI, dtype="int8")


def test_given_figures_are_roofs_too():
    given = Roofs.given(10e9, 200e9)
    assert roofline_seconds(30e9, 1e9, given, MEBI) == pytest.approx(3.0)
    assert roofline_seconds(1e9, 400e9, given, MEBI) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="bandwidth=0 and rate=5 must both be above 0"):
        Roofs.given(0, 5)


def test_measurements_refuse_what_they_cannot_measure():
    with pytest.raises(ValueError, match="working_set_bytes=100 must be at least 4096"):
        read_bandwidth(100, 1)
    with pytest.raises(ValueError, match="working_set_bytes=8192 is above the buffer's 4096"):
        read_bandwidth(8192, 1, buffer=torch.ones(1024))
    with pytest.raises(ValueError, match="M=0 must be at least 1"):
        matmul_rate(torch.float32, 0, 1)
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        read_bandwidth(4096, 0)
    with pytest.raises(ValueError, match="largest=5 bytes must be at least"):
        machines.roofs(1, 5)


def test_a_measurement_restores_the_number_of_threads():
    before = torch.get_num_threads()
    read_bandwidth(4096, before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_roofs_are_measured_once_and_within_the_memory(monkeypatch):
    monkeypatch.setattr(machines, "SQUARE", {torch.float32: 128, torch.bfloat16: 64, torch.int8: 64})
    monkeypatch.setattr(machines, "available_memory", lambda: 150 * MEBI)
    machines.roofs.cache_clear()
    try:
        roofs = machines.roofs(1)
        assert machines.roofs(1) is roofs
    finally:
        machines.roofs.cache_clear()
    assert list(roofs.bandwidth) == [16 * MEBI, 64 * MEBI]
    assert roofs.matmul["float32"].keys() == {1, 16, 64, 128}
    assert min(roofs.bandwidth.values()) > 0
    assert roofs.rate("float32") == roofs.matmul["float32"][128] > 0
