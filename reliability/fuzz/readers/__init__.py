"""The readers: one file each, which has a `Reader` under the name ``READER``."""

READERS: dict[str, str] = {}
"""Name on the command line, to the module. Modules are imported by the processes that read."""
