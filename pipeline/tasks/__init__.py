"""The tasks: each binds data, model, loss and metric for the engine, and runs inside a job."""
