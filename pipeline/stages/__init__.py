"""What is done to one shard in each stage, by plain classes; `pipeline/run.py` chains them with Ray Data."""
