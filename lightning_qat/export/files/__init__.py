"""Files that exporters are asked about, whoever wrote them: which target a file is of."""
