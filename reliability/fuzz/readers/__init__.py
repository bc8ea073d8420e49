"""The readers: one file each, which has a `Reader` under the name ``READER``."""

READERS: dict[str, str] = {
    name: f"reliability.fuzz.readers.{name}"
    for name in (
        "amct_config",
        "arrays",
        "checkpoint",
        "convert",
        "executor",
        "lightning_config",
        "lint",
        "manifest",
        "quantized_model",
        "recipe",
        "record",
        "run_file",
        "sensitivity_state",
        "tflite",
    )
}
"""Name on the command line, to the module. Modules are imported by the processes that read."""
