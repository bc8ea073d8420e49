"""What a run prints: lines survive progress bars, long lists are summarised, Ctrl-C speaks."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import QATCallback
from lightning_qat.callback.console import MOST_LINES
from lightning_qat.cli import main
from tests.callback.test_interruptions import Stop
from tests.callback.tiny import Net, Planned, loader, qat

RICH = """
import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from tests.callback.tiny import Net, loader, qat

bar = RichProgressBar(refresh_rate=1, console_kwargs={"force_terminal": True, "width": 60})
L.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_model_summary=False, callbacks=[qat(), bar],
).fit(Net(), loader())
"""


def test_phase_lines_are_printed_above_a_rich_progress_bar() -> None:
    pytest.importorskip("rich")
    code = [sys.executable, "-W", "ignore", "-c", RICH]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    # Rich prints on standard output, and moves the cursor over what others write.
    line = "QAT: epoch 0, step 2: quantize"
    assert line in " ".join(done.stdout.split())
    assert line not in done.stderr
    # There is no bar yet at the first batch.
    assert "QAT: epoch 0, step 0: calibrate" in done.stderr


class Deep(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(MOST_LINES) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
        self.net = nn.Sequential(*layers)
        self.odd = nn.Bilinear(4, 4, 1)
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_list_of_many_layers_is_summarised_and_written_to_a_file(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = qat()
    trainer(callback, max_steps=4).fit(Deep(), torch.randn(4, 4, 4))
    (text,) = [r.getMessage() for r in caplog.records if "layers quantized" in r.getMessage()]
    assert text.count("\n") < 10
    assert text.startswith(f"QAT: {MOST_LINES} layers quantized ({MOST_LINES} Linear), ")
    path = tmp_path / "qat_plan.txt"
    assert text.endswith(f"all of it: {path}")
    assert path.read_text() == f"{callback.report}\n"


def test_a_short_list_is_printed_whole_and_no_file_is_written(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = qat()
    trainer(callback, max_epochs=1).fit(Planned(), loader())
    assert f"QAT: {callback.report}" in caplog.messages
    assert list(tmp_path.iterdir()) == []


def test_what_the_callback_records_is_in_no_plan(trainer: Callable[..., L.Trainer]) -> None:
    callback = qat(exporters=["fake_quant_onnx"], trial_export=False)
    trainer(callback, fast_dev_run=True).fit(Net(), loader(), loader())
    assert callback.report is not None
    assert "getitem" not in str(callback.report)


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_ctrl_c_says_how_the_last_checkpoint_is_exported(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", trial_export=False)
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    run = trainer(callback, saves, Stop(KeyboardInterrupt()), enable_checkpointing=True)
    with pytest.raises(SystemExit):
        run.fit(Planned(), loader())
    (text,) = [m for m in caplog.messages if "interrupted" in m]
    first, *lines = text.splitlines()
    assert first == (
        "QAT: interrupted, so nothing was exported. Saved: the newest checkpoint is "
        f"'{tmp_path}/saved/last.ckpt', of step 4 of 6. The trained module is still in memory "
        "while this process lives (in a notebook, or where fit is called within try): "
        "trainer.save_checkpoint('trained.ckpt') saves it."
    )
    assert lines[0] == "To finish the export:"
    command = shlex.split(lines[1])
    assert command[:2] == ["lightning-qat", "export"]
    assert main(command[1:]) == 0
    assert (tmp_path / "out" / "planned_qdq.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exporters": ["onx"]}, r"No exporter named 'onx'; .*Installed exporters: \['cann', "),
        ({"recipe": "w8a8"}, "No recipe named 'w8a8': it is called 'int8' here"),
    ],
    ids=["exporter", "recipe"],
)
def test_a_wrong_name_stops_when_the_callback_is_made(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QATCallback(**options)
