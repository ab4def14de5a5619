"""The training engine: knows steps, ranks and files, but no task."""
