"""One module for each stage of dvc.yaml, of the same name: what it reads, what it writes, one call."""
