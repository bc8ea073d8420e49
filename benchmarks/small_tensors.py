"""What a quantizer costs where tensors are small: milliseconds of processor time per step.

    python -m benchmarks.small_tensors
    python -m benchmarks.small_tensors --only transformers/mobilebert --rounds 10

Of tiny networks of the zoo, where rounding itself takes next to nothing: what is left is Python and
the calls of torch around it. For each one the least of several steps (forward and backward) of the
float and of the prepared network, taken in turns, on one thread. Needs transformers.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models import all_architectures
from benchmarks.zoo_models.row import loss_of
from lightning_qat import prepare
from lightning_qat.quantizers.base import Quantizer

NAMES = ("transformers/mobilebert", "transformers/bert", "transformers/vit", "written/yolo")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=NAMES, help="names of the zoo")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | quantizers | float ms | prepared ms | over float | ms per quantizer |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        print(_row(name, arguments.rounds), flush=True)


def _row(name: str, rounds: int) -> str:
    architecture = all_architectures()[name]
    torch.manual_seed(0)
    net, inputs = architecture.build().train(), architecture.inputs()
    qat = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(qat, "int8", inputs)
    qat.train()
    steps = {net: list(net.parameters()), qat: list(qat.parameters())}
    least = dict.fromkeys(steps, float("inf"))
    # The first forwards find ranges.
    for number in range(rounds + 3):
        for model, parameters in steps.items():
            took = _step(model, inputs, parameters)
            if number >= 3:
                least[model] = min(least[model], took)
    plain, prepared = (1e3 * least[model] for model in steps)
    quantizers = sum(isinstance(module, Quantizer) for module in qat.modules())
    cells = (
        *(name, quantizers, f"{plain:.2f}", f"{prepared:.2f}", f"{prepared / plain:.1f}"),
        f"{(prepared - plain) / quantizers:.3f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _step(model: nn.Module, inputs: Any, parameters: list[nn.Parameter]) -> float:
    """Seconds of processor time of one forward and backward."""
    began = time.process_time()
    torch.autograd.backward(loss_of(model, inputs))
    took = time.process_time() - began
    for parameter in parameters:
        parameter.grad = None
    return took


if __name__ == "__main__":
    main()
