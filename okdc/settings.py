"""The import path by which the READMEs of bundles that are out there name `NetworkSettings`."""

from okdc.recipe import NetworkSettings

__all__ = ["NetworkSettings"]
