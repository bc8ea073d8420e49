"""What a pickle would make is found without making it."""

import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.torch_files.pickles import UnknownClass, check_pickle
from lightning_qat.torch_files.saved import check_saved


def saved(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer


def with_attribute() -> torch.Tensor:
    value = torch.ones(2)
    value.note = "seen"  # type: ignore[attr-defined]
    return value


def trained_optimizer() -> dict[str, Any]:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


LOADED: dict[str, Callable[[], Any]] = {
    "state_dict": lambda: nn.BatchNorm1d(3).state_dict(),
    "optimizer": trained_optimizer,
    "parameter": lambda: nn.Linear(2, 3).weight,
    "shared": lambda: (lambda t: [t, t[1:], t.view(2, 2)])(torch.arange(4.0)),
    "expanded": lambda: torch.ones(1).expand(100),
    "empty": lambda: torch.empty(0, 3),
    "dtypes": lambda: [torch.ones(2).to(d) for d in (torch.bfloat16, torch.uint16, torch.cfloat)],
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "attribute": with_attribute,
    "conjugate": lambda: torch.ones(2, dtype=torch.cfloat).conj(),
    "plain": lambda: {"a": [1, 2.5, None, True, "x", b"\x00\xff", bytearray(b"y"), 10**30, 1j]},
    "containers": lambda: [{(1, "a"): {3, 4}}, Counter("aab"), OrderedDict(x=(1, (2,)))],
    "torch's own": lambda: [torch.float32, torch.device("cpu"), torch.Size([2, 3])],
}


@pytest.mark.parametrize("what", LOADED)
def test_what_torch_loads_passes(what: str) -> None:
    file = saved(LOADED[what]())
    check_saved(file)
    torch.load(file, weights_only=True)


def test_a_class_is_named_unless_the_program_has_called_it_safe() -> None:
    file = saved({"limit": pytest.approx})
    with pytest.raises(UnknownClass, match="holds _pytest") as refused:
        check_saved(file)
    with torch.serialization.safe_globals([pytest.approx]):
        check_saved(file)
    assert refused.value.names == (f"{pytest.approx.__module__}.approx",)
    check_saved(file, None)


def calling(function: str, argument: bytes) -> bytes:
    module, _, name = function.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"R."


HOSTILE = {
    "a terabyte of zeros": (calling("builtins.bytearray", b"\x8a\x06\0\0\0\0\0\x01\x85"), "bytear"),
    "a tensor class": (calling("torch.FloatTensor", b"J\xff\xff\xff\x7f\x85"), "holds torch.Fl"),
    "a storage class": (
        calling("torch.storage.UntypedStorage", b"J\xff\xff\xff\x7f\x85"),
        "makes no plain value",
    ),
    "code": (calling("os.system", b"X\x04\0\0\0true\x85"), "holds os.system"),
    "tuples of tuples as a key": (
        b"\x80\x02}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.",
        "a key must be a text",
    ),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "puts a list into itself"),
    "a list in a list in itself": (
        b"\x80\x02]q\x00]q\x01h\x00a0h\x00h\x01a.",
        "has the instruction POP",
    ),
    "deep nesting": (b"\x80\x02" + b"]" * 2000 + b"a" * 1999 + b".", "levels deep"),
    "a memory without a value": (b"\x80\x02h\x07.", "a value is used that is not there"),
    "nothing on the stack": (b"\x80\x02R.", "a value is used that is not there"),
    "a storage that is missing": (
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.",
        "as large as its pickle says, 16 bytes; it has none",
    ),
    "no end": (b"\x80\x02K", "."),
    "nothing": (b"", "."),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_is_refused(what: str) -> None:
    content, text = HOSTILE[what]
    with pytest.raises(ValueError, match=text):
        check_pickle(content, {})


@pytest.mark.parametrize("size", [(2**40,), (2**20, 2**20)])
def test_a_tensor_that_claims_more_than_is_stored_is_refused(size: tuple[int, ...]) -> None:
    # Of a stride of 0, torch takes it: a terabyte, once somebody copies it.
    file = saved(torch.ones(1).expand(size))
    file.seek(0)
    assert torch.load(file, weights_only=True).shape == size
    with pytest.raises(ValueError, match="claims more than is stored, 1 numbers"):
        check_saved(file)


def test_a_storage_of_another_size_than_its_pickle_says_is_refused() -> None:
    file = saved(torch.ones(4))
    with zipfile.ZipFile(file) as archive:
        content = archive.read("archive/data.pkl")
    with pytest.raises(ValueError, match="as its pickle says, 16 bytes; it has 8"):
        check_pickle(content, {"0": 8})


def test_a_pickle_of_another_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="has the instruction FRAME"):
        check_pickle(pickle.dumps({"a": 1}, protocol=4), {})
