"""What `ingest` reads: one file a kind of source, the plan that cuts it into shards, and one picture
decoded."""
