"""Files that are not checkpoints, and paths that are not files: pointers, pages, pictures, devices, loops."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hostile.case import Case, file, plain

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
_UNKNOWN = "is not a checkpoint in a known format"


def cases() -> Iterator[Case]:
    """Return all cases."""
    yield from (*_contents(), *_special())


def _contents() -> Iterator[Case]:
    pickle = "is a pickle with no zip around it"
    for name, content, message in (
        ("lfs-pointer", POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("lfs-pointer-after-space", b"\n" + POINTER, "is a Git LFS pointer"),
        ("lfs-index", b'{"version":"https://git-lfs.github.com/spec/v1"}', "has no weight_map"),
        ("page", PAGE, "is a web page or XML"),
        ("xml", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or XML"),
        ("json-error", b'{"error":"Repository not found"}', "has no weight_map"),
        ("png", b"\x89PNG\r\n\x1a\n" + bytes(64), _UNKNOWN),
        ("jpeg", b"\xff\xd8\xff\xe0" + bytes(64), _UNKNOWN),
        ("gzip", gzip.compress(plain()), "is a gzip archive"),
        ("xz", b"\xfd7zXZ\0" + bytes(64), _UNKNOWN),
        ("zstd", b"\x28\xb5\x2f\xfd" + bytes(64), _UNKNOWN),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
        ("gguf", b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
        ("npy", b"\x93NUMPY\1\0" + bytes(64), _UNKNOWN),
        ("msgpack", b"\x82\xa1a\x01\xa1b\x02" + bytes(64), _UNKNOWN),
        ("onnx", b"\x08\x07\x12\x07pytorch" + bytes(64), _UNKNOWN),
        ("script", b"#!/bin/sh\ntouch ran\n", _UNKNOWN),
        ("python", b"import os\nos.system('touch ran')\n", _UNKNOWN),
        ("elf", b"\x7fELF\2\1\1" + bytes(64), _UNKNOWN),
        ("text", b"loss 0.31 at step 400\n", _UNKNOWN),
        ("one-byte", b"\0", "file is truncated: 1 bytes present"),
        ("random", bytes(range(7, 256)) * 9, _UNKNOWN),
        ("pickle-byte", b"\x80" + bytes(20), pickle),
    ):
        yield file(f"foreign/{name}", content, message, payload=name in ("script", "python"))
        yield file(f"foreign/{name}-as-safetensors", content, message, name=".safetensors")


def _empty(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"")


def _special() -> Iterator[Case]:
    def special(name: str, build: Callable[[Path], object], message: str, suffix: str = ".pt") -> Case:
        at = f"step-3{suffix}"
        return Case(id=f"special/{name}", build=lambda folder: build(folder / at), at=at, message=message)

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket address is limited to 107 bytes
            one.bind(path.name)
            os.chdir(here)

    def circle(path: Path) -> None:
        path.symlink_to("step-4.pt")
        path.with_name("step-4.pt").symlink_to(path.name)

    for suffix in (".pt", ".safetensors", ".index.json"):
        yield special(f"fifo{suffix}", os.mkfifo, "is a FIFO, not a regular file", suffix)
        yield special(f"zero{suffix}", lambda path: path.symlink_to("/dev/zero"), "is a device, not", suffix)
    yield special("random-device", lambda path: path.symlink_to("/dev/urandom"), "is a device, not a regular file")
    yield special("null", lambda path: path.symlink_to("/dev/null"), "is a device, not a regular file")
    yield special("terminal", lambda path: path.symlink_to("/dev/tty"), "device|regular file")
    yield special("full", lambda path: path.symlink_to("/dev/full"), "is a device, not a regular file")
    yield special("memory", lambda path: path.symlink_to("/proc/self/mem"), "file is empty|input/output|not a check")
    yield special("kernel-pipe", lambda path: path.symlink_to("/proc/kmsg"), "empty|permitted|permission|invalid|not a")
    yield special("socket", listening, "is a FIFO or socket, not a regular file")
    yield special("dangling-link", lambda path: path.symlink_to("gone.pt"), "is a link to a file that does not exist")
    yield special("link-to-itself", lambda path: path.symlink_to(path.name), "is a link that leads back to itself")
    yield special("link-circle", circle, "is a link that leads back to itself")
    yield special(
        "link-to-fifo", lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")), "is a FIFO"
    )
    yield special("link-through-a-file", lambda path: path.symlink_to("step-1.safetensors/x"), "not a directory")
    yield special("long-link", lambda path: path.symlink_to("x" * 300), "file name too long")

    def unreadable(path: Path) -> None:
        path.write_bytes(plain())
        path.chmod(0)

    yield Case(id="special/unreadable", build=lambda folder: unreadable(folder / "step-3.pt"), at="step-3.pt",
               message="permission denied", nobody=True)  # fmt: skip
    for name, shown in (("lr[red]-3.pt", r"lr\[red\]-3"), ("a\x1b[31m\n-3.pt", r"a\\x1b\[31m\\n-3"),
                        (os.fsdecode(b"\xff\xfe-3.pt"), r"\\udcff\\udcfe-3"), ("--force-3.pt", "--force-3"),
                        ("权重-3.pt", "权重-3"), ("%s{0}-3.pt", r"%s\{0\}-3"),
                        ("'; touch ran; '-3.pt", "touch ran")):  # fmt: skip
        yield Case(id=f"special/name-{shown}", build=partial(_empty, name), message=f"{shown}.*: file is empty")
