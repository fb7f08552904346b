"""Reading image shards."""
