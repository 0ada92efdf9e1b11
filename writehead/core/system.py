"""What the operating system says about processor, memory and load: None where it says nothing."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "sve",
)
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
CPUS = Path("/sys/devices/system/cpu")


def read(path: Path) -> str | None:
    """The stripped text of a file of the kernel, or None where there is no such file or no permission."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = read(path)
    return int(text) if text and text.lstrip("-").isdigit() else None


def allowed_cpus() -> set[int]:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders that limit this process, innermost first, in both generations of control groups."""
    for line in (read(PROC / "self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in (
            (CGROUP / controllers, CGROUP / controller) if controllers else (CGROUP, CGROUP / "unified")
        ):
            if not root.is_dir():
                continue
            folder = root / name.lstrip("/")
            while folder != root and root in folder.parents:
                yield folder
                folder = folder.parent
            yield root
            break


def cpu_quota() -> float | None:
    """Cores' worth of time that control groups grant this process, None for no limit."""
    quotas = []
    for folder in _cgroups("cpu"):
        if (text := read(folder / "cpu.max")) and not text.startswith("max"):
            quota, period = (int(part) for part in text.split())
            quotas.append(quota / period)
        limit, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if limit and period_us and limit > 0:
            quotas.append(limit / period_us)
    return min(quotas, default=None)


def cores() -> int:
    """Physical cores that this process may use at once: its affinity, one per core, within its quota."""
    physical = set()
    for cpu in allowed_cpus():
        topology = CPUS / f"cpu{cpu}" / "topology"
        package, core = read(topology / "physical_package_id"), read(topology / "core_id")
        physical.add((package, core) if core is not None else (None, str(cpu)))
    quota = cpu_quota()
    return len(physical) if quota is None else max(1, min(len(physical), round(quota)))


def cpu_model() -> str | None:
    """The processor's name."""
    for line in (read(PROC / "cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def instruction_sets() -> dict[str, bool] | None:
    """Which of the instruction sets that matter to matrix products this processor has."""
    for line in (read(PROC / "cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return {name: name in flags for name in INSTRUCTION_SETS}
    return None


def caches() -> dict[str, int] | None:
    """Bytes of each cache of the first processor allowed, for instance {"L1d": 32768, "L2": 1048576}."""
    found = {}
    for index in sorted((CPUS / f"cpu{min(allowed_cpus())}" / "cache").glob("index*")):
        level, kind, size = (read(index / name) for name in ("level", "type", "size"))
        if level and kind and size and size[:-1].isdigit():
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            found[f"L{level}{suffix}"] = int(size[:-1]) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)
    return found or None


def _meminfo(name: str) -> int | None:
    for line in (read(PROC / "meminfo") or "").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group that limits this process's memory."""
    for folder in _cgroups("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None and limit < 2**60:  # above: generation 1's "no limit"
                yield limit, max(0, used - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Bytes of file cache counted as used in a control group, which the kernel drops on demand."""
    for line in (read(folder / "memory.stat") or "").splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def total_memory() -> int | None:
    """Bytes of memory of the machine, or of the control group where that is less."""
    total = _meminfo("MemTotal")
    return None if total is None else min([total, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int | None:
    """Bytes that can still be allocated: free memory of the machine, or of the control group if less."""
    free = _meminfo("MemAvailable")
    return None if free is None else min([free, *(limit - used for limit, used in _memory_limits())])


def peak_memory() -> int | None:
    """Bytes of memory that this process held at most, mapped files as far as they were read."""
    for line in (read(PROC / "self/status") or "").splitlines():
        if line.startswith("VmHWM:"):  # what getrusage says would include the parent before the exec
            return int(line.split()[1]) * 1024
    return None


def busy_seconds() -> float | None:
    """Seconds that the allowed processors have worked for anyone since the machine started, all added up.

    Of a virtual machine this counts what its host took away while there was work.
    """
    names = {f"cpu{cpu}" for cpu in allowed_cpus()}
    ticks, seen = 0, False
    for line in (read(PROC / "stat") or "").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _, _, *interrupts_and_stolen = (int(field) for field in fields[:8])
            ticks, seen = ticks + user + nice + system + sum(interrupts_and_stolen), True
    return ticks / os.sysconf("SC_CLK_TCK") if seen else None


def own_seconds() -> float | None:
    """Processor seconds of this process and all its descendants, those that ended included."""
    parents, ticks = {}, {}
    for folder in PROC.glob("[0-9]*"):
        if text := read(folder / "stat"):
            fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(int(field) for field in fields[11:15])
    if os.getpid() not in ticks:
        return None
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")
