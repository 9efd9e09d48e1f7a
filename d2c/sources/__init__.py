"""Labelled pictures from folders, Parquet, tar files and saved datasets, behind one interface."""

from d2c.sources.base import BadFile, Kind, Labels, Reader, Source, SourceClass, relabel
from d2c.sources.imagenet import ImageNetClass, imagenet_classes
from d2c.sources.opening import open_source

__all__ = [
    "BadFile",
    "ImageNetClass",
    "Kind",
    "Labels",
    "Reader",
    "Source",
    "SourceClass",
    "imagenet_classes",
    "open_source",
    "relabel",
]
