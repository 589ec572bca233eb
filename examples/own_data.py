"""Images in class folders, train/ and val/: what `--data` takes, made here from the digits."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import okdc

digits = load_digits()
folder = Path(tempfile.mkdtemp())
for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    place = folder / ("val" if i % 5 == 0 else "train") / f"digit_{label}"
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype(np.uint8)).save(place / f"{i}.png")

result = okdc.compress(
    "resnet20_cifar", data=str(folder), method="dml", img_size=32, hflip=0.0, crop_padding=2, epochs=1, batch_size=64
)
print(f"top-1 {result.metrics['top1']:.1f} %")
