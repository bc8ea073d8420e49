"""A transformer encoder: embedding, attention and feed-forward layers on integers.

    python -m examples.transformer

The task: which of two tokens occurs more often in a sequence. Attention becomes four quantized
projections and two products between activations; the report says what stays float and why.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback

LENGTH, TOKENS = 15, 8


def sequences(count: int, seed: int) -> TensorDataset:
    """Tokens ``(count, LENGTH)``, and whether there are more ones than twos."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (count, LENGTH), generator=generator)
    more = (tokens == 1).sum(1) > (tokens == 2).sum(1)
    return TensorDataset(tokens, more.long())


class Encoder(L.LightningModule):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, LENGTH, dtype=torch.long)
        self.embed = nn.Embedding(TOKENS, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embed(tokens) + self.position)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor]) -> None:
        hits = self(batch[0]).argmax(1) == batch[1]
        self.log("accuracy", hits.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def main(epochs: int = 10, samples: int = 4096, out: Path = Path("qat_export")) -> float:
    """The accuracy of the quantized network on fresh sequences, between 0 and 1."""
    L.seed_everything(0, verbose=False)
    qat = QATCallback("int8", exporters=["fake_quant_onnx"], export_dir=out)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[qat],
        logger=False,
        enable_checkpointing=False,
    )
    net = Encoder()
    trainer.fit(net, DataLoader(sequences(samples, seed=0), batch_size=64, shuffle=True))
    test = DataLoader(sequences(1024, seed=1), batch_size=256)
    accuracy: float = trainer.test(net, test, verbose=False)[0]["accuracy"]
    print(qat.report)
    print(qat.delivered[0].agreement)
    print(f"int8: {accuracy:.2%} right")
    return accuracy


if __name__ == "__main__":
    main()
