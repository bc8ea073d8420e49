"""What LiteRT lacks, spelled in operators it has; shared by both backends."""
