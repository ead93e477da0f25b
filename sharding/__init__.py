"""What the scripts stand on: one step of the flow from files to shards, and back, in each file."""
