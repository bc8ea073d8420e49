"""Files that exporters are asked about, whoever wrote them: their target, and what is in them."""
