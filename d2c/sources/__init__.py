"""Labelled pictures from folders, Parquet and tar files, behind one interface."""

from d2c.sources.base import BadFile, Kind, Reader, Source, SourceClass
from d2c.sources.imagenet import ImageNetClass, imagenet_classes
from d2c.sources.opening import open_source

__all__ = [
    "BadFile",
    "ImageNetClass",
    "Kind",
    "Reader",
    "Source",
    "SourceClass",
    "imagenet_classes",
    "open_source",
]
