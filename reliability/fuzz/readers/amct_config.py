"""AMCT's configurations of retraining: the simple one (.cfg) and that of a network (.json)."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from lightning_qat.recipe.amct_config import json_config
from lightning_qat.recipe.recipe import Recipe
from reliability.fuzz.mutate_text import mutate_json, mutate_text
from reliability.fuzz.reader import Reader
from reliability.fuzz.readers.recipe import read

_CFG = """\
# every field
batch_num: 2
retrain_data_quant_config {
  ulq_quantize { clip_max_min { clip_max: 6.0 clip_min: -6.0 } fixed_min: true dst_type: INT8 }
}
retrain_weight_quant_config { arq_retrain { dst_type: INT8 channel_wise: true } }
quant_skip_layers: "stem"
quant_skip_types: "Embedding"
skip_layers: "head"
skip_layer_types: "ConvTranspose2d"
override_layer_configs {
  layer_name: "encoder.0.conv"
  retrain_data_quant_config: { ulq_quantize: { dst_type: INT16 } }
  retrain_weight_quant_config: { ulq_retrain: { channel_wise: false } }
}
override_layer_types {
  layer_type: "Conv2d"
  retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }
}
"""


def _seeds(folder: Path) -> Sequence[Path]:
    (folder / "simple.cfg").write_text(_CFG)
    (folder / "small.cfg").write_text("batch_num: 1\n")
    recipe = Recipe.load("amct").to_dict()
    layers = {
        name: (recipe["activation"] | {"clip": clip}, recipe["weight"])
        for name, clip in (("stem", None), ("encoder.0.conv", [-1.0, 2.5]))
    }
    values = json_config(1, layers, {"stem": "Conv2d", "encoder.0.conv": "Conv2d"})
    (folder / "network.json").write_text(json.dumps(values, indent=4, separators=(",", ":")))
    return [folder / "simple.cfg", folder / "small.cfg", folder / "network.json"]


def _mutate(content: bytes, generator: random.Random) -> bytes:
    return (mutate_json if content.startswith(b"{") else mutate_text)(content, generator)


READER = Reader("amct_config", _seeds, _mutate, read, (ValueError,))
