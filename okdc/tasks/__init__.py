"""What an output and a label are: outputs in words, and the score of outputs against labels.

Imports: `errors`.
"""

from __future__ import annotations
