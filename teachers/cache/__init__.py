"""Cache of teacher outputs: the store, the codec of its records, and its shard files."""
