"""The commands of ``lightning-qat``: a file for each, of its name, imported when asked for."""
