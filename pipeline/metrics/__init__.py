"""What is measured: accuracy, mIoU, parameters and multiply-adds."""

from pipeline.metrics.accuracy import ClassificationMeter
from pipeline.metrics.complexity import count_macs, count_parameters
from pipeline.metrics.segmentation import ConfusionMatrix

__all__ = ["ClassificationMeter", "ConfusionMatrix", "count_macs", "count_parameters"]
