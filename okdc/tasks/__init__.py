"""What an output and a label are: outputs in words, and the score of outputs against labels.

Of key points: `heatmaps` has the maths of maps, `keypoint_scores` how good points are, `skeleton` what they are called.

Imports: `errors`.
"""

from __future__ import annotations
