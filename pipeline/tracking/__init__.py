"""MLflow as a mirror of the run's files."""
