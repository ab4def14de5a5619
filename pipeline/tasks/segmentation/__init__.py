"""ADE20K semantic segmentation with Semantic FPN (Table 4)."""
