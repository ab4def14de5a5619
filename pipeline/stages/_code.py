"""The code that training and evaluation results depend on, by part; `CODE` of the stages is made of these."""

LOOP = (
    "pipeline/train/counted_noise.py",
    "pipeline/train/loop.py",
    "pipeline/train/schedule.py",
    "pipeline/train/sync_batch_norm.py",
    "pipeline/tasks/training.py",
    "pipeline/world.py",
)
DEVICE = ("pipeline/tasks/device_batch.py",)
CLASSIFIER = ("pipeline/models/block.py", "pipeline/models/native", "pipeline/models/poolformer.py")
SEGMENTER = (*CLASSIFIER, "pipeline/models/semantic_fpn.py")
IMAGES = (
    "pipeline/data/draws.py",
    "pipeline/data/ffcv_loader.py",
    "pipeline/data/loaders.py",
    "pipeline/data/native",
    "pipeline/data/pixels.py",
)
SCENES = (
    "pipeline/data/ffcv_loader.py",
    "pipeline/data/segmentation.py",
    "pipeline/data/segmentation_pixels.py",
)
CONVERSION = (
    "pipeline/data/beton.py",
    "pipeline/data/convert.py",
    "pipeline/data/folders.py",
    "pipeline/data/manifest.py",
    "pipeline/data/native",
    "pipeline/data/pixels.py",
    "pipeline/data/stored.py",
)
