"""Which devices run the kernels, and what the others are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_qat.numerics.gpu import launch
from lightning_qat.numerics.ways import way_on

GPU = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a card, a Triton and a C compiler, each of which a test may take away."""
    machine = SimpleNamespace(capability=(9, 0), triton=SimpleNamespace(__version__="3.7.1"))

    def import_triton(name: str) -> Any:
        if machine.triton is None:
            raise ImportError(name)
        return machine.triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(launch, "import_module", import_triton)
    monkeypatch.setattr(launch, "_try", lambda _: None)
    return machine


def why_not(device: torch.device = GPU) -> str | None:
    return launch.why_not.__wrapped__(device)


def test_a_card_with_triton_runs_the_kernels(card: Any) -> None:
    assert why_not() is None


def test_an_old_card_is_named(card: Any) -> None:
    card.capability = (7, 5)
    assert why_not() == "Triton needs compute capability 8.0, which Tesla T4 does not have"


def test_a_missing_triton_is_named(card: Any) -> None:
    card.triton = None
    assert "Triton is not installed" in str(why_not())


def test_an_old_triton_is_named(card: Any) -> None:
    card.triton = SimpleNamespace(__version__="3.1.0")
    assert "Triton 3.1.0 is too old; install 3.4 or newer" in str(why_not())


def test_a_missing_compiler_is_named(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(launch, "_try", no_compiler)
    assert str(why_not()).startswith("Triton cannot launch a kernel (Failed to find C compiler.).")


def test_other_devices_have_no_kernels(card: Any) -> None:
    assert why_not(torch.device("mps")) == "there are no kernels for 'mps'"


def test_the_log_names_the_way_and_what_to_do(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_qat.numerics.ways.why_not", launch.why_not.__wrapped__)
    assert way_on(GPU) == "Triton kernels"
    card.triton = None
    assert way_on(GPU).startswith(
        "operations of torch on cuda:0, with the same numbers but slower: Triton is not installed."
    )


def test_the_meta_device_takes_the_kernels_only_while_launches_are_counted() -> None:
    x = torch.empty(3, device="meta")
    assert not launch.suits(x)
    with launch.count_launches():
        assert launch.suits(x)
        assert not launch.suits(x.double())
        assert not launch.suits(torch.empty(3))
    assert not launch.suits(x)


def test_an_empty_tensor_launches_nothing() -> None:
    from lightning_qat.quantizers.factory import activation_quantizer
    from lightning_qat.recipe.specs import ActivationSpec

    quantizer = activation_quantizer(ActivationSpec(clip=(-1.0, 1.0))).to("meta")
    with launch.count_launches() as launches:
        assert quantizer(torch.empty(0, 3, device="meta")).shape == (0, 3)
    assert launches == []
