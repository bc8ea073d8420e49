"""Find what a QDQ graph of any tool quantizes."""
