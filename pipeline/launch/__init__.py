"""Where work runs: cluster profiles, fingerprints, attach or submit, the worker's entry point."""
