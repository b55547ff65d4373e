"""The filter of system calls, for both machines, read as the kernel reads it."""

from __future__ import annotations

import struct

from manylora.evaluate import confined


def test_the_filter_of_both_machines_knows_its_calls() -> None:
    """BPF as the kernel reads it: wrong machine dies, listed calls are refused, others pass."""
    for machine, (column, number) in confined.ARCHITECTURES.items():
        program = confined.system_call_filter(machine, 4321)
        fork_or_exec = confined.REFUSED["execve"][column]
        clone = (56, 220)[column]
        kill = (62, 129)[column]
        read = (0, 63)[column]
        assert fork_or_exec is not None
        assert answer(program, number ^ 1, read) == "kill"
        assert answer(program, number, read) == "allow"
        assert answer(program, number, fork_or_exec) == "EPERM"
        assert answer(program, number, 435) == "ENOSYS"
        assert answer(program, number, 600) == "ENOSYS"
        assert answer(program, number, 0x40000000 + read) == "ENOSYS"
        assert answer(program, number, clone, 17) == "EPERM"
        assert answer(program, number, clone, 0x10F00) == "allow"
        assert answer(program, number, kill, 4321) == "allow"
        assert answer(program, number, kill, 4320) == "EPERM"
        for calls in confined.REFUSED.values():
            call = calls[column]
            assert call is None or answer(program, number, call) == "EPERM"


def answer(program: bytes, machine: int, call: int, argument: int = 0) -> str:
    """A filter's answer, by its own small reading of BPF."""
    data = struct.pack("<IIQ6Q", call, machine, 0, *[argument] * 6)
    value, place = 0, 0
    while True:
        code_, yes, no, operand = struct.unpack_from("<HBBI", program, 8 * place)
        place += 1
        if code_ == 0x20:
            value = struct.unpack_from("<I", data, operand)[0]
        elif code_ == 0x54:
            value &= operand
        elif code_ == 0x15:
            place += yes if value == operand else no
        elif code_ == 0x35:
            place += yes if value >= operand else no
        else:
            assert code_ == 0x06
            names = {0x7FFF0000: "allow", 0x80000000: "kill", 0x50001: "EPERM", 0x50026: "ENOSYS"}
            return names[operand]
