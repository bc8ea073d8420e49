"""``lightning-qat doctor``."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from lightning_qat.cli.command import FINE, command, json_option, print_json
from lightning_qat.cli.console import print_table, say

_PACKAGES = (
    *("lightning-qat", "torch", "lightning", "numpy", "onnx", "onnx-ir", "onnxruntime"),
    *("onnxscript", "click", "rich"),
)
_OPTIONAL: Mapping[str, str] = {
    "jsonargparse": "for LightningCLI and --config: pip install 'lightning-qat[cli]'",
    "litert-torch": "for the target tflite: pip install 'lightning-qat[tflite]'",
    "ai-edge-litert": "for the target tflite: pip install 'lightning-qat[tflite]'",
    "TinyNeuralNetwork": "the other backend of tflite, from its repository: see docs/tflite.md",
    "openvino": "to verify QDQ files in it, too: pip install 'lightning-qat[openvino]'",
    "triton": "for quantizers on a GPU; comes with torch's CUDA builds",
}
"""Packages that not everybody needs, and what for."""
_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        kind: ``package``, ``target`` or ``speed``.
        name: What was looked at.
        works: Whether it is there and works.
        found: Its version, or what was found, in words; what to do where it does not work.
    """

    kind: str
    name: str
    works: bool
    found: str


@command("doctor")
@json_option
def doctor(as_json: bool) -> int:
    """Show what is installed and what works here.

    Packages and their versions, the targets that can be exported to and what the others need, and
    what makes quantizers fast on this machine: a C compiler on a CPU, Triton on a GPU. The exit
    code is 0 whatever is missing.

      lightning-qat doctor
    """
    say("looking at packages, targets and devices")
    checks = [*_packages(), *_targets(), *_devices()]
    if as_json:
        print_json([asdict(check) for check in checks])
        return FINE
    rows = [(c.kind, c.name, "yes" if c.works else "no", c.found) for c in checks]
    print_table(("", "what", "works", "found"), rows)
    return FINE


def _packages() -> Iterator[Check]:
    yield Check("package", "python", True, f"{platform.python_version()}, {platform.platform()}")
    for package in (*_PACKAGES, *_OPTIONAL):
        try:
            yield Check("package", package, True, version(package))
        except PackageNotFoundError:
            use = _OPTIONAL.get(package, f"pip install {package}")
            yield Check("package", package, False, f"not installed; {use}")


def _targets() -> Iterator[Check]:
    from lightning_qat.export.load import ENTRY_POINT_GROUP, load_exporter
    from lightning_qat.export.protocol import Runnable

    for name in sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP)):
        try:
            exporter = load_exporter(name)
            exporter.check_available()
        except Exception as error:  # of a third party's package, any
            yield Check("target", name, False, str(error))
            continue
        runtimes = exporter.runtimes if isinstance(exporter, Runnable) else ()
        yield Check("target", name, True, f"files run here in {'; '.join(runtimes) or 'nothing'}")


def _devices() -> Iterator[Check]:
    import torch

    from lightning_qat.numerics.kernels.build import compiled_loops
    from lightning_qat.numerics.ways import way_on

    compiled = compiled_loops() is not None
    remedy = "" if compiled else "; install gcc, or name a C compiler with OpenMP in CC"
    yield Check("speed", "cpu", compiled, way_on(torch.device("cpu")) + remedy)
    flags = _cpu_flags()
    if flags is not None:
        told = ", ".join(flags) or "none of " + ", ".join(_CPU_FLAGS)
        wide = "avx2" not in flags or any("vnni" in flag for flag in flags)
        doubt = "" if wide else "; ONNX Runtime's products of uint8 saturate: see docs/onnx.md"
        yield Check("speed", "cpu instructions", wide, told + doubt)
    if not torch.cuda.is_available():
        yield Check("speed", "cuda", False, f"no device (torch {torch.__version__})")
    for index in range(torch.cuda.device_count()):
        way = way_on(torch.device("cuda", index))
        name = torch.cuda.get_device_name(index)
        yield Check("speed", f"cuda:{index}", way == "Triton kernels", f"{name}: {way}")


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """Those of the vector instructions that this CPU has; ``None``: unknown."""
    if not cpuinfo.is_file():
        return None
    words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    return [flag for flag in _CPU_FLAGS if flag in words]
