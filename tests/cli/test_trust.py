"""``--trust``: a converted model with an operator of one's own is loaded when it is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from tests.cli.conftest import Command
from tests.models import trained


class Tripled(nn.Module):
    """Calls an operator of a library of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.lightning_qat_tests.triple(self.linear(x))
        return y


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with torch.library._scoped_library("lightning_qat_tests", "DEF") as library:
        library.define("triple(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("triple", lambda x: x * 3, "CompositeExplicitAutograd")
        x = torch.randn(2, 4)
        path = tmp_path_factory.mktemp("own") / "net.pt2"
        convert(trained(Tripled(), x), x).save(path)
        yield path


def test_an_operator_of_ones_own_needs_trust(command: Command, own: Path) -> None:
    done = command("inspect", own)
    assert done.code == 2
    assert "must call operators of torch" in done.err
    assert "'torch.ops.lightning_qat_tests.triple.default'" in done.err
    assert "If it is your own, or you trust who made it, add --trust" in done.err
    assert "may run any code" in done.err
    assert command("inspect", own, "--trust").code == 0


@pytest.mark.parametrize("option", ["--trust", "--json"])
def test_export_trusts_a_converted_model_when_told(
    command: Command, own: Path, tmp_path: Path, option: str
) -> None:
    done = command("export", own, "--to", "fake_quant_onnx", "--out", tmp_path, option)
    if option == "--trust":
        # It is loaded; that ONNX has no such operator is the target's affair.
        assert "add --trust" not in done.err
        assert (tmp_path / "manifest.json").is_file()
    else:
        assert done.code == 2
        assert "add --trust" in done.err


@pytest.mark.parametrize(
    "name", ["verify", "compare", "report", "export", "sensitivity", "inspect"]
)
def test_every_command_that_loads_says_what_trusting_means(command: Command, name: str) -> None:
    said = " ".join(command(name, "--help").out.split())
    assert "--trust" in said
    assert "It may run any code" in said
