"""What only a set of archives does, wherever they lie: list their members, and read them."""
