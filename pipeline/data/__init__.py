"""Data: folders in ImageNet's and ADE20K's layouts, .beton files, loaders, the demo's images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.convert import convert_image_folder, convert_segmentation_folder
    from pipeline.data.loaders import eval_loader, train_loader
    from pipeline.data.segmentation import segmentation_eval_loader, segmentation_train_loader

_HOMES = {
    "convert_image_folder": "convert",
    "convert_segmentation_folder": "convert",
    "train_loader": "loaders",
    "eval_loader": "loaders",
    "segmentation_train_loader": "segmentation",
    "segmentation_eval_loader": "segmentation",
}
__all__ = [
    "convert_image_folder",
    "convert_segmentation_folder",
    "eval_loader",
    "segmentation_eval_loader",
    "segmentation_train_loader",
    "train_loader",
]


def __getattr__(name: str) -> Any:
    """Import on first use: ffcv, numba and torch take seconds that the demo's data need not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
