"""What only a bucket does: list and read objects, find shards, run into it. Needs obstore."""
