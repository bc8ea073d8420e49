"""Transformer blocks as people write them, in every target: both products of attention on integers.

The models are a block of GPT-2, one of a ViT, and one of LLaMA with rotary positions and grouped
queries, each with ``F.scaled_dot_product_attention``.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import lightning as L
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.callback.tiny import Net, loader, qat
from tests.models import trained


class GPT2Block(nn.Module):
    """Causal attention with dropout behind one projection, and a gelu MLP; takes (batch, 6, 16)."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dropout = heads, 0.1
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, time, width)
        x = x + self.c_proj(y)
        return x + self.mlp(self.ln_2(x))


class ViTBlock(nn.Module):
    """timm's attention and MLP; takes (batch, 6, 16)."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class LlamaBlock(nn.Module):
    """Rotary positions, two heads for each of the keys, and a gated MLP; takes (batch, 6, 16)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2, time: int = 6) -> None:
        super().__init__()
        size = width // heads
        self.size = size
        self.input_norm, self.post_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, shared * size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        frequencies = 1e4 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(time).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_norm(x)
        q, k = self.rotated(self.heads(self.q_proj(y))), self.rotated(self.heads(self.k_proj(y)))
        v = self.heads(self.v_proj(y))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


BLOCKS: dict[str, type[nn.Module]] = {"gpt2": GPT2Block, "vit": ViTBlock, "llama": LlamaBlock}
LAYERS = {"gpt2": 4, "vit": 4, "llama": 7}


def inputs(samples: int = 8) -> Tensor:
    return torch.randn(samples, 6, 16)


@functools.cache
def block(name: str) -> tuple[nn.Module, QuantizedModel]:
    """A block after some training steps, and the same converted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs()
        qat = trained(BLOCKS[name](), x, "int8").eval()
        return qat, convert(qat, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_converted_block_is_near_the_float_block(name: str) -> None:
    qat, quantized = block(name)
    x = inputs(16)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), qat(x), rtol=0, atol=1e-6)
    twin = BLOCKS[name]()
    twin.load_state_dict(
        {k: v for k, v in qat.state_dict().items() if k in twin.state_dict()}, strict=False
    )
    with torch.no_grad():
        expected = twin.eval()(x)
    error = (quantized(x) - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1


@pytest.mark.parametrize("name", BLOCKS)
def test_onnx_runtime_computes_every_product_on_integers(name: str, tmp_path: Path) -> None:
    _, quantized = block(name)
    artifact = export(quantized, FakeQuantOnnxExporter(), tmp_path / "net")
    agreement = verify(quantized, artifact, inputs(16), FakeQuantOnnxExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1
    graph = onnx.load(artifact.files["model"]).graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        for source in node.input:
            while made_by[source].op_type in ("Transpose", "Reshape"):
                source = made_by[source].input[0]
            assert made_by[source].op_type == "DequantizeLinear"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it says that the file is for this machine
    onnxruntime.InferenceSession(artifact.files["model"], options, ["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearMatMul"] == LAYERS[name] + 2
    assert kinds["MatMul"] + kinds["FusedMatMul"] + kinds["Gemm"] == 0


@pytest.mark.parametrize("name", BLOCKS)
def test_a_file_holds_products_of_4_bits_between_sums_of_8(name: str, tmp_path: Path) -> None:
    x = inputs()
    model = BLOCKS[name]()
    prepare(model, "w4a4", x)
    with torch.no_grad():
        model.train()(x)
    quantized = convert(model.eval(), x)
    artifact = export(quantized, FakeQuantOnnxExporter(), tmp_path / "net")
    agreement = verify(quantized, artifact, inputs(16), FakeQuantOnnxExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1
    levels = {
        key: tensor.qparams.grid.qmax - tensor.qparams.grid.qmin + 1
        for key, tensor in quantized.tensors.items()
    }
    products = [n for key, n in levels.items() if "scaled_dot_product_attention_0" in key]
    sums = [n for key, n in levels.items() if ".add_" in f".{key}" or "norm_0_0" in key]
    assert len(products) >= 4
    assert set(products) == {16}
    assert len(sums) >= 4
    assert set(sums) == {256}


@pytest.mark.parametrize("name", BLOCKS)
def test_cann_s_files_agree_and_name_the_products_that_stay_float(
    name: str, tmp_path: Path
) -> None:
    _, quantized = block(name)
    artifact = export(quantized, CannExporter(), tmp_path / "net")
    agreement = verify(quantized, artifact, inputs(16), CannExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1
    # Ascend's integer products need a constant weight.
    assert sum(note.startswith("'/MatMul") for note in artifact.notes) == 2


@pytest.mark.parametrize("name", BLOCKS)
def test_litert_agrees(name: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    _, quantized = block(name)
    exporter = TFLiteExporter(backend="litert")
    artifact = export(quantized, exporter, tmp_path / "net")
    agreement = verify(quantized, artifact, inputs(4), exporter)
    assert agreement.parameters_equal
    # Sums of rounded branches are rounded again.
    assert agreement.max_steps < 2.1, str(agreement)


class Classifier(Net):
    """The ViT block under a head, in a LightningModule; takes (batch, 1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        del self.conv, self.bn
        self.embed, self.block = nn.Linear(6, 16), ViTBlock()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embed(x.squeeze(1))).mean(1))
        return logits


def test_a_trainer_trains_it_exports_it_and_says_what_a_target_leaves_float(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporters = ["fake_quant_onnx", "cann"]
    module = Classifier()
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[qat(exporters=exporters, export_dir=tmp_path)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, loader())
    said = [message for message in caplog.messages if "matmul: 2 planned on integers" in message]
    assert said == [
        "QAT: cann: matmul: 2 planned on integers, computed in float on rounded values (block)."
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    for target in exporters:
        assert manifest["targets"][target]["agreement"]["parameters_equal"]
    assert manifest["targets"]["fake_quant_onnx"]["differences"] == []
