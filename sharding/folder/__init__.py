"""What only a folder does: list and read raw files, find shards, run into it."""
