"""Run an exported bundle the way a service would: numpy, pillow and onnxruntime, nothing of okdc or torch.

python deploy_onnx.py runs/NAME/export IMAGE...
"""

import importlib.util
import sys
from pathlib import Path

from PIL import Image

bundle, *paths = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("predict", bundle / "predict.py")
predict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(predict)

predictor = predict.load(bundle)  # model.onnx, preprocess.json and labels.txt of the bundle
for path, best in zip(paths, predictor([Image.open(path) for path in paths], top=1), strict=True):
    label, probability = best[0]
    print(f"{path.name}: {label} ({probability:.0%})")
