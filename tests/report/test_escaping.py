"""Names and texts of a model are shown, never run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.report.collect import collect
from lightning_qat.report.data import Arrow, Box, Plan
from lightning_qat.report.folder import read_manifest
from lightning_qat.report.page import render
from tests.models import trained
from tests.report.conftest import Exported
from tests.report.parsed import Parsed

HOSTILE = '</svg></title></script><script>alert("1")</script><img src=x onerror=alert(1)>\'&{{7*7}}'


class Hostile:
    """An exporter whose notes and roles are hostile."""

    name = HOSTILE

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        path = path_prefix.with_name("file")
        path.write_text("")
        return Artifact(self.name, {HOSTILE: path}, (HOSTILE,))


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    module = nn.Sequential(nn.Linear(3, 3))
    model = convert(trained(module, x), x)
    training: dict[str, Any] = {
        "left_float": [[HOSTILE, HOSTILE, HOSTILE]],
        "loss": [[0, 1.0], [1, 2.0]],
        "phases": [[0, HOSTILE]],
    }
    export_all(model, [Hostile()], tmp_path, "net", training=training)
    data = collect(model, read_manifest(tmp_path), tmp_path, HOSTILE)
    # torch captures no layer of such a name; a file from elsewhere may hold one.
    layer, tensor = data.layers[0], data.tensors[0]
    data = replace(
        data,
        layers=(replace(layer, name=HOSTILE, kind=HOSTILE),),
        tensors=(replace(tensor, name=HOSTILE, made_by=HOSTILE),),
        plan=Plan(
            (Box(HOSTILE, HOSTILE, "integer", 0), Box(HOSTILE, HOSTILE, "output")),
            (Arrow(0, 1, HOSTILE, 8),),
        ),
        facts={HOSTILE: HOSTILE},
        recipe={HOSTILE: HOSTILE},
        cautions=(HOSTILE,),
    )
    html = render(data)
    page = Parsed(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.rows("Layer", "Weight scale")[0]["Layer"] == HOSTILE
    assert [*page.rows("Name", "Reason")[0].values()] == [HOSTILE] * 3
    assert "49" not in html.partition("<section")[0]


def test_the_browser_is_told_to_run_no_other_script_and_to_load_nothing(exported: Exported) -> None:
    data = collect(exported.model, read_manifest(exported.folder), exported.folder, "net")
    html = render(data)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy[1].startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*", html) == []
    assert "http" not in html.replace("http-equiv", "")
