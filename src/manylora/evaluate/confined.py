"""The child process that runs a model's program: gives up its rights, then runs it.

A script, not a module of the package: evaluate/code.py starts it as
`python confined.py order.json CHANNEL`, and it needs the standard library alone. It says "ready" on
CHANNEL (a file descriptor) once all limits hold, "cannot: WHY" if one does not, and then runs
nothing. After the last line of the program it sends the order's token: nothing else counts as
passed, so a program that leaves early has failed.

What holds it, all enforced by the kernel, without root and without namespaces, also in a container:

    Landlock     reads the interpreter's files, writes plain files in its own folder, nothing else
    seccomp      no new process or program, no socket, no signal to others, no change of the rights,
                 owner or times of files, no memory or queue that outlives it
    rlimit       address space, processor time, size of a file, open files
    capset       root's rights are gone

Sources: Linux's Documentation/userspace-api/landlock.rst and seccomp_filter.rst, and the headers
landlock.h, seccomp.h, filter.h, unistd_64.h and asm-generic/unistd.h. What is refused follows
HumanEval's reliability_guard (arXiv 2107.03374, github.com/openai/human-eval), which takes the same
things from the interpreter alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import types
from json import dumps, load  # by name: a program may put its own in their place
from os import _exit, write

LIBC = ctypes.CDLL(None, use_errno=True)
EPERM, ENOSYS = 1, 38
OPEN_FILES, FILE_BYTES = 64, 16 << 20
READABLE = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/sys/devices/system/cpu",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)

# landlock.h: access rights to files.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FIRST_RIGHTS = (1 << 13) - 1
FOLDER_RIGHTS = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | TRUNCATE

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NEWEST_KNOWN_CALL = 469
# Call numbers on x86_64 and aarch64; None: the call is not there.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # new processes and programs; clone is below
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    # sockets; kernel doors that open them or files by the side
    **{"socket": (41, 198), "io_uring_setup": (425, 425), "bpf": (321, 280)},
    **{"perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    # other processes
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434)},
    **{"pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119)},
    **{"sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    **{"sched_setaffinity": (203, 122), "migrate_pages": (256, 238), "move_pages": (279, 239)},
    # memory and queues that outlive the process or that no limit counts
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194)},
    **{"msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mq_unlink": (241, 181)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # the view of the file system
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39)},
    **{"pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428)},
    **{"move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432)},
    **{"fspick": (433, 433), "mount_setattr": (442, 442)},
    # what Landlock does not cover: rights, owners, times and attributes of files
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None)},
    **{"utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6)},
    **{"fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15)},
    **{"fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466)},
    **{"file_setattr": (469, 469), "truncate": (76, 45), "personality": (135, 92)},
}
# Their arguments lie in memory, where a filter cannot look; libc falls back to the older call.
ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}
LEFT_OPEN_FLAGS = (0, 1, 2, 0x201, 0x202)  # O_TRUNC only for a file that is opened for writing


def allowed_arguments(pid: int) -> dict[tuple[int | None, int | None], tuple[int, int, list[int]]]:
    """Calls let through for some values alone: their numbers -> argument, mask, values."""
    thread, flags, own = 0x10000, 0x203, [pid]
    return {
        (56, 220): (0, thread, [thread]),  # clone
        (62, 129): (0, 0xFFFFFFFF, own),  # kill
        (200, 130): (0, 0xFFFFFFFF, own),  # tkill
        (234, 131): (0, 0xFFFFFFFF, own),  # tgkill
        (302, 261): (0, 0xFFFFFFFF, [0, pid]),  # prlimit64
        (2, None): (1, flags, list(LEFT_OPEN_FLAGS)),  # open
        (257, 56): (2, flags, list(LEFT_OPEN_FLAGS)),  # openat
        # fcntl: not F_SETOWN, by which the kernel sends a signal to another process
        (72, 25): (1, 0xFFFFFFFF, [*range(8), 1030, 1032]),
        # ioctl: questions about terminals and pipes; blocking; close-on-exec
        (16, 29): (1, 0xFFFFFFFF, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
    }


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(seconds: float, memory_mb: int) -> None:
    """Hard limits, which nobody without root's rights can raise again."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: int(seconds) + 2,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def drop_rights(parent: int) -> None:
    """No capability, none to be had again; dies with its parent."""
    header = struct.pack("Ii", 0x20080522, 0)
    _checked(LIBC.capset(header, bytes(24)), "capset")
    _checked(LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _checked(LIBC.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        raise OSError("the process that started this one is gone")


def confine_files(folder: str) -> None:
    """Landlock: read what the interpreter needs, write plain files in the folder, nothing else.

    No folders, links or sockets within the folder either: what the program leaves is one flat list.
    """
    call = LIBC.syscall
    version = _checked(call(ctypes.c_long(444), None, ctypes.c_size_t(0), 1), "Landlock")
    rights = FIRST_RIGHTS | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rights |= IOCTL_DEV if version >= 5 else 0
    network = 3 if version >= 4 else 0  # bind, connect over TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets, signals
    wanted = struct.pack("QQQ", rights, network, scoped)
    rules = _checked(call(ctypes.c_long(444), wanted, ctypes.c_size_t(24), 0), "Landlock ruleset")
    readable = {*READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix}
    granted = {path: READ_FILE | READ_DIR for path in readable if os.path.exists(path)}
    granted["/dev/null"] |= WRITE_FILE
    for path, right in {**granted, folder: FOLDER_RIGHTS}.items():
        if not os.path.isdir(path):
            right &= WRITE_FILE | READ_FILE
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", right & rights, place)
        _checked(call(ctypes.c_long(445), rules, 1, rule, 0), f"Landlock rule for {path}")
        os.close(place)
    _checked(call(ctypes.c_long(446), rules, 0), "Landlock restriction")
    os.close(rules)


def system_call_filter(machine: str, pid: int) -> bytes:
    """The seccomp filter as BPF instructions (code, jump if true, jump if false, value)."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, mask_, leave = 0x20, 0x15, 0x35, 0x54, 0x06
    refuse, absent = (leave, 0, 0, 0x50000 | EPERM), (leave, 0, 0, 0x50000 | ENOSYS)
    number = (load, 0, 0, 0)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, 0x80000000), number]
    # Above every known call: calls of a newer kernel, and x86_64's x32 calls.
    code += [(at_least, 0, 1, NEWEST_KNOWN_CALL + 1), absent]
    for calls, answer in ((REFUSED, refuse), (ABSENT, absent)):
        for numbers in calls.values():
            if (call := numbers[column]) is not None:
                code += [(equal, 0, 1, call), answer]
    for numbers, (argument, mask, values) in allowed_arguments(pid).items():
        if (call := numbers[column]) is None:
            continue
        # Low words of arguments come first: both architectures are little-endian.
        body = [(load, 0, 0, 16 + 8 * argument), (mask_, 0, 0, mask)]
        body += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
        body += [refuse, number]
        code += [(equal, 0, len(body), call), *body]
    code.append((leave, 0, 0, 0x7FFF0000))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def filter_system_calls() -> None:
    """Install the filter; it can never be taken off again."""
    code = ctypes.create_string_buffer(system_call_filter(platform.machine(), os.getpid()))
    program = struct.pack("HxxxxxxP", (len(code) - 1) // 8, ctypes.addressof(code))
    _checked(LIBC.prctl(22, 2, program, 0, 0), "seccomp filter")


def run(source: str) -> str:
    """Why the program stopped before its end, or nothing.

    Its module is not "__main__", as in HumanEval's harness: what a model writes under
    `if __name__ == "__main__"` is no part of the answer.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except MemoryError as error:
        error.__traceback__ = error.__context__ = None
        module.__dict__.clear()  # room to report
        return "MemoryError"
    except BaseException as error:
        lines, trace = [], error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<program>":
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        try:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")[:2000]
        except BaseException:
            text = type(error).__name__
        return f"{text} (line {lines[0]})" if lines else text
    return ""


def main(order_file: str, channel: int) -> None:
    """Take the order, give up all rights, run, report, leave."""
    with open(order_file, encoding="utf-8") as file:
        order = load(file)
    os.unlink(order_file)
    try:
        limit_resources(order["seconds"], order["memory_mb"])
        drop_rights(order["parent"])
        confine_files(os.getcwd())
        filter_system_calls()
    except (OSError, ValueError) as error:
        write(channel, f"cannot: {error}\n".encode())
        _exit(1)
    write(channel, b"ready\n")
    reason = run(order["source"])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # the program closed or replaced it; what it printed is its own affair
            continue
    report = {"reason": reason} if reason else {"token": order["token"]}
    write(channel, dumps(report).encode())
    _exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
