"""ImageNet-1K classification (Tables 2, 5 and 7)."""
