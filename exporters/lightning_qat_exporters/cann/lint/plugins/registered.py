"""For which opsets CANN's open sources register an ONNX plugin, operator by operator.

The parser looks for ``ai.onnx::<opset>::<operator>`` exactly, with no other version to fall back
on (``ConstructOriType`` and ``AdapterOpType`` of ``parser/parser/onnx/onnx_parser.cc``,
``hicann/ge``). The registrations are those of ``*_onnx_plugin.cpp`` in ``hicann/ops-nn``
(e5c3fa9), ``ops-math`` (c419332) and ``ops-cv`` (6ae8765), experimental ones left out. Constant is
read by the parser itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.cann.deploy_file import name_of

_LAST = 18
_FROM_8 = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization "
    "Cast Ceil Celu Clip Concat ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace "
    "Det Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather "
    "GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater "
    "HardSigmoid Hardmax "
    "Identity If InstanceNormalization LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax "
    "LpNormalization LpPool MatMul Max MaxPool MaxRoiPool Mean Min Mul Multinomial Neg Not Or "
    "PRelu Pad Pow RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal "
    "ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare Relu Reshape RoiAlign Round ScatterND Selu Shape Sigmoid Sign Sin Sinh Size "
    "Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK "
    "Transpose Unsqueeze Where Xor"
).split()
_FROM: Mapping[int, str] = {
    9: "Compress IsNaN MeanVarianceNormalization NonZero OneHot Shrink",
    10: "IsInf Mod NonMaxSuppression Resize ReverseSequence ThresholdedRelu",
    11: "BitShift ConcatFromSequence ScatterElements SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SplitToSequence Unique",
    12: "SoftmaxCrossEntropyLoss",
    14: "HardSwish Trilu",
    15: "Bernoulli CastLike",
    16: "GridSample",
    17: "LayerNormalization",
    18: "BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im Mish",
}
REGISTERED: Mapping[str, frozenset[int]] = {
    **{name: frozenset(range(8, _LAST + 1)) for name in _FROM_8},
    **{n: frozenset(range(first, _LAST + 1)) for first, ns in _FROM.items() for n in ns.split()},
    "GreaterOrEqual": frozenset({8, *range(12, _LAST + 1)}),
    "GridSample": frozenset({11, *range(16, _LAST + 1)}),
    "MaxUnpool": frozenset({9, *range(11, _LAST + 1)}),
    "ReduceL1": frozenset(range(8, 18)),
    "ReduceL2": frozenset(range(8, 18)),
    "Scatter": frozenset({9, 10, 11}),
    "Upsample": frozenset({8, 9, *range(11, 17)}),
}
"""The opsets at which an operator of ONNX has a plugin."""

_ELSEWHERE = ("Constant", "QuantizeLinear", "DequantizeLinear")
"""Read by the parser itself; what the lint names anyway."""


def registration_findings(nodes: Sequence[onnx.NodeProto], opset: int) -> Iterator[Finding]:
    """Operators without a plugin at the file's opset, each once.

    Args:
        nodes: All nodes, those of branches too.
        opset: Of the file.
    """
    first: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type):
            first.setdefault(node.op_type, node)
    newer = [node for kind, node in first.items() if opset > _LAST and kind in REGISTERED]
    if newer:
        yield Finding(
            "error",
            name_of(newer[0]),
            f"only Ascend's own operators have a plugin above opset {_LAST}: the parser looks for "
            "the file's opset and no other (ge, onnx_parser.cc)",
            f"{', '.join(sorted(n.op_type for n in newer))} at opset {opset}",
            f"Export at opset 11, or at the lowest that expresses the model, up to {_LAST}",
        )
    for kind, node in first.items():
        if kind in _ELSEWHERE or (kind in REGISTERED and opset > _LAST):
            continue
        if kind not in REGISTERED:
            yield Finding(
                "warning",
                name_of(node),
                "an operator must have an ONNX plugin; CANN's open sources have none for it",
                kind,
                "Write it with other operators, or make sure that your CANN version has it",
            )
        elif opset not in REGISTERED[kind]:
            yield Finding(
                "error",
                name_of(node),
                f"{kind} must be at an opset for which CANN registers it: the parser looks for the "
                "file's opset and no other (ge, onnx_parser.cc)",
                f"opset {opset}; registered are {_spans(REGISTERED[kind])}",
                "Export at one of these opsets, or write the node with other operators",
            )


def _spans(opsets: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for opset in sorted(opsets):
        if runs and runs[-1][-1] == opset - 1:
            runs[-1].append(opset)
        else:
            runs.append([opset])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
