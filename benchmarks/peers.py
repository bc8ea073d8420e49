"""Other quantization-aware training tools, prepared alike, to be measured beside ours.

Every adapter takes a float network and gives a network to train whose convolutions and linear
layers read inputs and weights of so many bits. ``installed()`` says which of them can run here;
torch.ao comes with torch.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn


def _nothing(model: nn.Module) -> None:
    """Most tools need no further word."""


@dataclass(frozen=True)
class Peer:
    """One tool.

    Args:
        package: The distribution that it comes in.
        prepare: Float network, batches to calibrate with (inputs, the first one is the example),
            bits of weights and of activations; the network is left as it is.
        freeze: Hold ranges; to be called at 60 % of the training and before evaluation.
        fewest_bits: It quantizes to no fewer.
    """

    package: str
    prepare: Callable[[nn.Module, Sequence[Tensor], int, int], nn.Module]
    freeze: Callable[[nn.Module], None] = _nothing
    fewest_bits: int = 2


def _run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def torch_ao(net: nn.Module, batches: Sequence[Tensor], weight: int, activation: int) -> nn.Module:
    """torch.ao's FX mode: moving ranges, batch norm folded in training."""
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    ao: Any = quantization  # not typed
    warnings.filterwarnings("ignore", "(.|\n)*torch.ao|.*reduce_range|.*quant_min")  # its own
    config = ao.QConfig(
        activation=ao.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAverageMinMaxObserver,
            dtype=torch.quint8,
            quant_min=0,
            quant_max=2**activation - 1,
        ),
        weight=ao.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAveragePerChannelMinMaxObserver,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=-(2 ** (weight - 1)),
            quant_max=2 ** (weight - 1) - 1,
        ),
    )
    mapping = ao.QConfigMapping().set_global(config).set_object_type(nn.Embedding, None)
    model: nn.Module = prepare_qat_fx(copy.deepcopy(net).train(), mapping, (batches[0],))
    _run(model.eval(), batches)
    return model.train()


def _freeze_torch_ao(model: nn.Module) -> None:
    from torch.ao.quantization import disable_observer

    model.apply(disable_observer)


def brevitas(net: nn.Module, batches: Sequence[Tensor], weight: int, activation: int) -> nn.Module:
    """Brevitas: learned activation scales from statistics, weights by their largest value."""
    import brevitas.nn as qnn
    from brevitas.quant import (
        Int8WeightPerChannelFloat,
        ShiftedUint8ActPerTensorFloat,
        Uint8ActPerTensorFloat,
    )

    kinds = {nn.Conv1d: qnn.QuantConv1d, nn.Conv2d: qnn.QuantConv2d}
    options: dict[str, Any] = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": weight,
        "input_bit_width": activation,
        "input_collect_stats_steps": len(batches),
    }
    model = copy.deepcopy(net)
    unsigned = _reads_nothing_negative(net, batches)
    for name, layer in list(model.named_modules()):
        new: nn.Module
        own = Uint8ActPerTensorFloat if name in unsigned else ShiftedUint8ActPerTensorFloat
        options["input_quant"] = own
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            new = kinds[type(layer)](
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                bias=bias,
                **options,
            )
        elif isinstance(layer, nn.Linear):
            new = qnn.QuantLinear(layer.in_features, layer.out_features, bias, **options)
        else:
            continue
        new.load_state_dict(layer.state_dict(), strict=False)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
    _run(_batchnorms_held(model), batches)
    return model.train()


def modelopt(net: nn.Module, batches: Sequence[Tensor], weight: int, activation: int) -> nn.Module:
    """NVIDIA ModelOpt: ranges of the calibration, static from there on."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weight, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": activation, "axis": None}},
        ],
        "algorithm": "max",
    }
    for name in _reads_nothing_negative(net, batches):
        of_input = {"num_bits": activation, "axis": None, "unsigned": True}
        config["quant_cfg"].append({"quantizer_name": f"{name}.input_quantizer", "cfg": of_input})
    model: nn.Module = mtq.quantize(
        copy.deepcopy(net).eval(), config, lambda model: _run(model, batches)
    )
    return model.train()


def aimet(net: nn.Module, batches: Sequence[Tensor], weight: int, activation: int) -> nn.Module:
    """Qualcomm AIMET: learned ends of ranges, from the least expected error of the calibration."""
    import aimet_torch.nn as ann
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantization.encoding_analyzer import SqnrEncodingAnalyzer

    model = copy.deepcopy(net).eval()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue
        new = ann.QuantizationMixin.from_module(layer)
        of_rows = (len(layer.weight), *[1] * (layer.weight.dim() - 1))
        new.param_quantizers["weight"] = QuantizeDequantize(
            of_rows, weight, True, encoding_analyzer=SqnrEncodingAnalyzer(of_rows)
        )
        new.input_quantizers[0] = QuantizeDequantize(
            (), activation, False, encoding_analyzer=SqnrEncodingAnalyzer(())
        )
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
    with ann.compute_encodings(model):
        _run(model, batches)
    return model.train()


def nncf(net: nn.Module, batches: Sequence[Tensor], weight: int, activation: int) -> nn.Module:
    """NNCF: its own choice of what is quantized, learned ranges, biases corrected before."""
    import nncf as tool

    assert (weight, activation) == (8, 8)
    model: nn.Module = tool.quantize(
        _Root(copy.deepcopy(net)).eval(),
        tool.Dataset(list(batches)),
        preset=tool.QuantizationPreset.MIXED,
        subset_size=len(batches),
    )
    return model.train()


class _Root(nn.Module):
    """NNCF adds a module to the root, which a ``Sequential`` would run as a layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """As the network."""
        result: Tensor = self.net(x)
        return result


def _reads_nothing_negative(net: nn.Module, batches: Sequence[Tensor]) -> set[str]:
    """The names of layers that read no number below zero: pictures, or what relu gives."""
    lowest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
            lowest[name] = min(lowest.get(name, 0.0), float(inputs[0].min()))

        return note

    model = copy.deepcopy(net).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(watch(name))
    _run(model, batches)
    return {name for name, low in lowest.items() if low >= 0.0}


def _batchnorms_held(model: nn.Module) -> nn.Module:
    """In training mode, as statistics are only collected there, but for batch norm."""
    for module in model.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


PEERS: Mapping[str, Peer] = {
    "torch.ao FX": Peer("torch", torch_ao, freeze=_freeze_torch_ao),
    "Brevitas": Peer("brevitas", brevitas),
    "ModelOpt": Peer("nvidia-modelopt", modelopt),
    "AIMET": Peer("aimet-torch", aimet),
    "NNCF": Peer("nncf", nncf, fewest_bits=8),
}


def installed() -> tuple[dict[str, Peer], list[str]]:
    """Those that are installed, by name and version, and the names of those that are not."""
    found, absent = {}, []
    for name, peer in PEERS.items():
        try:
            found[f"{name} {version(peer.package).partition('+')[0]}"] = peer
        except PackageNotFoundError:
            absent.append(name)
    return found, absent
