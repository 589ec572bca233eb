"""What is known of a network's heat maps beside themselves: the input's size, the Gaussians, the key points.

B batch, K key points, h w map. The stride is that of the maps that come, so that a network need not say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from okdc.errors import RecipeError
from okdc.tasks.shared import heatmaps
from okdc.tasks.shared.heatmaps import Encoding
from okdc.tasks.shared.skeleton import Skeleton

DECODINGS = {"exact": "log-parabola", "official": "official"}  # of each encoding, in words of keypoints.json
NAMELESS = Skeleton(())


@dataclass(frozen=True)
class Maps:
    """Heat maps of images (C, H, W) of `size`, of the points of `skeleton`; `boxes` and `margin` are the data's."""

    size: tuple[int, ...] = ()
    skeleton: Skeleton = NAMELESS
    encoding: Encoding = "exact"
    boxes: str = "given"
    margin: float = 1.0

    @staticmethod
    def of(noted: Mapping[str, Any]) -> Maps:
        """From what a run or a bundle notes (`facts`), of which nothing need be there."""
        given = dict(noted.get("keypoints") or {})
        if "skeleton" in given:
            given["skeleton"] = Skeleton.of(given["skeleton"])
        given |= {key: noted[own] for key, own in (("size", "input_size"), ("encoding", "encoding")) if own in noted}
        return Maps(**{**given, "size": tuple(given.get("size", ()))})

    def facts(self) -> dict[str, Any]:
        """Plain values that `of` makes it again from."""
        return {
            "keypoints": {
                "size": list(self.size), "skeleton": self.skeleton.facts(), "encoding": self.encoding,
                "boxes": self.boxes, "margin": self.margin,
            }
        }  # fmt: skip

    def file(self, size: Sequence[int]) -> dict[str, Any]:
        """keypoints.json, for maps of `size` (h, w): all that turns them into points on an image."""
        skeleton, (down, across) = self.skeleton, self.stride(size)
        return {
            "names": list(skeleton.names), "skeleton": [list(edge) for edge in skeleton.edges],
            "pairs": [list(pair) for pair in skeleton.pairs or ()], "sigmas": list(self.sigmas),
            "stride": down if down == across else [across, down], "input": [self.size[-1], self.size[-2]],
            "sigma": heatmaps.sigma_for(size), "decoding": DECODINGS[self.encoding], "boxes": self.boxes,
            "margin": self.margin,
        }  # fmt: skip

    @property
    def input_size(self) -> tuple[int, ...]:
        """(C, H, W) of the images; RecipeError where nobody said it."""
        if not self.size:
            raise RecipeError(
                "heat maps become points by the size of the network's input, which the task pose was not told; "
                'expected okdc.tasks.get("pose", {"input_size": (3, 256, 256)}).'
            )
        return self.size

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Those of OKS, (K,)."""
        return self.skeleton.sigmas

    def stride(self, size: Sequence[int]) -> tuple[float, float]:
        """Input pixels per pixel of maps of `size` (h, w), of height and width."""
        return heatmaps.stride_of(self.input_size[-2:], size)

    def decode(self, maps: Tensor) -> Tensor:
        """Points (B, K, 3) of maps (B, K, h, w), in input pixels, with the height of the peak."""
        return heatmaps.decode(maps, self.stride(maps.shape[2:]), self.encoding)

    def targets(self, labels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of labels (B, K, 3 or more) the maps (B, K, h, w) of `size` that are to be learned, and weights (B, K)."""
        stride, sigma = self.stride(size), heatmaps.sigma_for(size)
        made = heatmaps.render(labels, size, stride, sigma, self.encoding)
        return made, heatmaps.weights(labels, size, stride, sigma, self.encoding)

    def named(self, keypoints: int) -> Maps:
        """The same, with numbers for names where nobody named the key points."""
        if self.skeleton.names:
            return self
        return replace(self, skeleton=Skeleton(tuple(map(str, range(keypoints)))))
