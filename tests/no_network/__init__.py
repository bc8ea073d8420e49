"""What keeps tests, and every Python that they start, from the network."""
