"""An object file made callable, without a compiler in memory where that goes.

The object of the step on x86-64 needs little: its sections, and 64-bit addresses written into them. Where a file is
such an ELF object, on Linux, `link` does just that; any other goes to LLVM, through llvmlite, which takes 50 MiB.

Objects come from our own cache, their checksum compared: nothing here guards against a hostile one.

This module does not know what the code computes, or where it is kept.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

ELF_64 = b"\x7fELF\x02\x01\x01"  # little endian, version 1
RELOCATABLE_X86_64 = 1, 62
PROGBITS, SYMTAB, RELA = 1, 2, 4  # types of sections
WRITABLE, IN_MEMORY = 1, 2  # flags of theirs
UNDEFINED = 0  # the section of a symbol that is not defined in the file
R_X86_64_64 = 1  # the relocation: 64 bits become the symbol's address plus an addend

Function = Callable[[int, int], None]
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_engines: list[object] = []  # of LLVM: they own the code


def load(data: bytes, name: str) -> Function:
    """The function void name(int64, int64) of an object file; it lets go of the interpreter's lock while it runs.

    The code stays in memory until the process ends. Raises OSError where the system lets no memory be executed.
    """
    address = link(data, name) if sys.platform == "linux" else None
    function: Function = _SIGNATURE(_load_by_llvm(data, name) if address is None else address)
    return function


def _load_by_llvm(data: bytes, name: str) -> int:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


# Linking -----------------------------------------------------------------------------------------


class _Section(NamedTuple):
    """Elf64_Shdr."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


class _Symbol(NamedTuple):
    """Elf64_Sym."""

    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def link(data: bytes, name: str) -> int | None:
    """Bring an object file into executable memory: the address of a function; None if it takes more than is done here.

    The formats are those of the System V ABI (gABI, chapter 4, and its x86-64 supplement). Raises OSError.
    """
    if not data.startswith(ELF_64) or struct.unpack_from("<HH", data, 16) != RELOCATABLE_X86_64:
        return None
    sections = list(_sections(data))
    if any(section.flags & IN_MEMORY and section.flags & WRITABLE for section in sections):
        return None
    places, size = _lay_out(sections)
    base = _allocate(size)
    addresses = _addresses(data, sections, {i: base + place for i, place in places.items()})
    image = bytearray(size)
    for i, place in places.items():
        image[place : place + sections[i].size] = _bytes_of(data, sections[i])
    for section in sections:
        if section.type != RELA or section.info not in places:
            continue
        for at, what, addend in struct.iter_unpack("<QQq", _bytes_of(data, section)):
            target = addresses[what >> 32][1]
            if what & 0xFFFFFFFF != R_X86_64_64 or target is None:
                return None
            struct.pack_into("<Q", image, places[section.info] + at, target + addend)
    ctypes.memmove(base, bytes(image), size)
    _make_executable(base, size)
    return dict(addresses)[name]


def _sections(data: bytes) -> Iterator[_Section]:
    (first,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    for i in range(count):
        yield _Section(*struct.unpack_from("<IIQQQQIIQQ", data, first + i * size))


def _bytes_of(data: bytes, section: _Section) -> bytes:
    return data[section.offset : section.offset + section.size]


def _lay_out(sections: list[_Section]) -> tuple[dict[int, int], int]:
    """Where the sections with code and constants go, by their number, and how much memory they take."""
    places, end = {}, 0
    for i, section in enumerate(sections):
        if section.type == PROGBITS and section.flags & IN_MEMORY:
            places[i] = -(-end // section.align) * section.align
            end = places[i] + section.size
    return places, end


def _addresses(data: bytes, sections: list[_Section], placed: dict[int, int]) -> list[tuple[str, int | None]]:
    """Name and address of each symbol; those that are not defined here are looked for in the C library."""
    table = next(section for section in sections if section.type == SYMTAB)
    names = _bytes_of(data, sections[table.link])
    found: list[tuple[str, int | None]] = []
    for symbol in map(_Symbol._make, struct.iter_unpack("<IBBHQQ", _bytes_of(data, table))):
        name = names[symbol.name : names.index(b"\0", symbol.name)].decode()
        if symbol.section in placed:
            found.append((name, placed[symbol.section] + symbol.value))
        else:
            found.append((name, _of_c_library(name) if name and symbol.section == UNDEFINED else None))
    return found


def _of_c_library(name: str) -> int | None:
    function = getattr(ctypes.CDLL(None), name, None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


def _allocate(size: int) -> int:
    """Fresh memory to write to, which is never given back."""
    allocate = ctypes.CDLL(None, use_errno=True).mmap
    allocate.restype = ctypes.c_void_p
    allocate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address: int = allocate(None, size, access, kind, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise _failed("no memory for the compiled CPU kernels")
    return address


def _make_executable(address: int, size: int) -> None:
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(address, size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise _failed("the compiled CPU kernels cannot be made executable")


def _failed(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
