"""The Python in docs/ runs as it stands; ``test_examples`` runs that of the README.

The blocks of a page run one after the other, as a reader copies them, among the names that pages
take for granted (``names``). ``<!-- not run: REASON -->`` above a block leaves it out.
"""

import re
import shutil
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_qat
from lightning_qat import convert, export, prepare
from tests.tiny_module import TinyModule, random_loader

ROOT = Path(__file__).parents[1]
HOME = ROOT / "docs" / "index.md"
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page != HOME]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```$",
    flags=re.DOTALL | re.MULTILINE,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of each block of a page that runs."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start("code")].count("\n") + 1, textwrap.dedent(found["code"]))
        for found in BLOCK.finditer(text)
        if found["why"] is None
    ]


def train(model: nn.Module) -> None:
    """A loop of the reader's own."""
    model.train()
    for x, _ in random_loader():
        model(x).square().mean().backward()
    model.eval()


def evaluate(model: nn.Module) -> float:
    """Any number that is higher for a better model."""
    with torch.no_grad():
        return sum(-F.cross_entropy(model(x), y).item() for x, y in random_loader())


def names() -> dict[str, Any]:
    """What pages take for granted: a model and its data."""
    images = torch.randn(8, 1, 8, 8)
    return {
        **{name: getattr(lightning_qat, name) for name in lightning_qat.__all__},
        **{"L": L, "torch": torch, "nn": nn, "F": F, "train": train, "evaluate": evaluate},
        **{"module": TinyModule(), "model": TinyModule(), "another_model": TinyModule()},
        **{"float_model": TinyModule().eval(), "onnxruntime": onnxruntime},
        **{"datamodule": random_loader(), "loader": random_loader()},
        **{"images": images, "example_inputs": images, "test_batch": images, "x": images.numpy()},
        **{"input_data": images, "batches": [images, images + 1]},
    }


def made_before(images: Tensor) -> dict[str, Any]:
    """What pages that explain results start from: a trained model and its files in ``out``."""
    trained = TinyModule()
    prepare(trained, "int8", images)
    train(trained)
    quantized = convert(trained, images)
    export(quantized, "cann", "out/net")
    artifact = export(quantized, "fake_quant_onnx", "out/net")
    for name in ("model_qdq.onnx", "model_qat.onnx"):
        shutil.copy(artifact.files["model"], name)
    return {"qat_model": trained, "quantized": quantized, "artifact": artifact}


class QuickTrainer(L.Trainer):
    """The reader's trainer, without devices, loggers and many epochs."""

    def __init__(self, max_epochs: int = 1, **options: Any) -> None:
        quick = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        quick |= {"enable_progress_bar": False, "enable_model_summary": False}
        super().__init__(max_epochs=min(max_epochs, 3), **quick | options)  # type: ignore[arg-type]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own, with the files that pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", QuickTrainer)
    Path("retrain.cfg").write_text("batch_num: 1\n", encoding="utf-8")


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path) -> None:
    torch.manual_seed(0)
    scope = names()
    if re.search(r"quantized, artifact|_q\w+\.onnx\"|out/net_", str(blocks(page))):
        scope |= made_before(scope["images"])
    for line, code in blocks(page):
        if find_spec("matplotlib") is None:
            code = re.sub(r"^.*\.plot\(.*$", "", code, flags=re.MULTILINE)
        # Line numbers in a traceback are those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), scope)


def test_the_home_page_begins_as_the_readme_does() -> None:
    readme = blocks(ROOT / "README.md")
    assert [code for _, code in blocks(HOME)] == [code for _, code in readme[:1]]


def test_a_block_that_is_left_out_says_why() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- not run") == sum(
            found["why"] is not None for found in BLOCK.finditer(text)
        ), f"{page.relative_to(ROOT)}: `<!-- not run: REASON -->` stands right above a block"
