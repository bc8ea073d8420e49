"""A process of its own in which onnx's inference of shapes tries models."""

from __future__ import annotations

import atexit
import os
import struct
import subprocess
import sys
from contextlib import suppress
from threading import Lock
from typing import IO, cast

from onnx import onnx_cpp2py_export

_SERVE = """
import os, struct, sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

answers = os.fdopen(os.dup(1), "wb", 0)
os.dup2(2, 1)  # what native code prints is no answer
try:
    import resource
except ImportError:
    resource = None
try:
    loader = ExtensionFileLoader(*sys.argv[1:])
    native = module_from_spec(spec_from_loader(sys.argv[1], loader))
    loader.exec_module(native)
    infer = native.shape_inference.infer_shapes
except Exception:
    from onnx.onnx_cpp2py_export.shape_inference import infer_shapes as infer

def limit(memory):
    try:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
    except Exception:
        pass

answers.write(b".")
while True:
    header = sys.stdin.buffer.read(16)
    if len(header) < 16:
        break
    size, memory = struct.unpack("<QQ", header)
    limit(memory)
    try:
        infer(sys.stdin.buffer.read(size), False, False, True)
    except MemoryError:
        break
    except Exception:
        pass
    answers.write(b".")
"""
"""Loads onnx's C++ code without its Python packages, which take eight times as long."""
_MEMORY = 2**31
"""Bytes that the process may take beside a hundred times the model's."""


class InferenceProcess:
    """Tries one model after another, 0.001 s each; begun for the first, in 0.03 s.

    A process that ends is replaced. A fork has one of its own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ends_on(self, model: bytes) -> bool:
        """Whether inference of a serialized model ends the process, or takes all memory."""
        with self._lock:
            is_new = self._process is None
            if self._survives(model):
                return False
            # One that has tried others may have been killed, or have too little memory left.
            return is_new or not self._survives(model)

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _survives(self, model: bytes) -> bool:
        if self._process is None:
            self._process = _begin()
            if self._process is None:
                return True  # models cannot be tried here
        answer = b""
        try:
            with suppress(OSError):  # it has ended
                answer = _ask(self._process, model)
        finally:
            # Also where Ctrl-C leaves an answer unread.
            if not answer:
                self.close()
        return bool(answer)

    def _forget(self) -> None:
        """In a fork: leave the process to its parent."""
        if self._process is not None:
            self._process.returncode = 0
        self._process, self._lock = None, Lock()


def _begin() -> subprocess.Popen[bytes] | None:
    native = onnx_cpp2py_export.__name__, onnx_cpp2py_export.__file__
    with suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *native],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if _read(process):
            return process
        process.communicate()
    return None


def _ask(process: subprocess.Popen[bytes], model: bytes) -> bytes:
    requests = cast(IO[bytes], process.stdin)
    requests.write(struct.pack("<QQ", len(model), _MEMORY + 100 * len(model)) + model)
    requests.flush()
    return _read(process)


def _read(process: subprocess.Popen[bytes]) -> bytes:
    return cast(IO[bytes], process.stdout).read(1)
