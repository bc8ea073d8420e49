"""QDQ files as other tools write them: small nets, and one file per tool that quantizes them."""
