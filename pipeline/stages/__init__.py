"""One module for each stage of dvc.yaml, of the same name: what it reads, what it writes, one call.

`CODE` in a module is what its result depends on: the stage's code dependencies in dvc.yaml, and part of the
job's fingerprint.
"""
