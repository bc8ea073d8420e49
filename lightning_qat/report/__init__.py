"""The page of an export: what was quantized, how well, what is float, where files differ."""
