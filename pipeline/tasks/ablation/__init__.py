"""Table 5: PoolFormer-S12 with one thing changed, trained and evaluated as the classifiers are."""
