"""The intermediate representation: the converted model that every exporter reads."""
