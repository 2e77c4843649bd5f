# SPDX-License-Identifier: Apache-2.0
"""Which tiles train.

Files: score (tiles by their gradients), select (from scores to tiles within the budget), choice (the tiles and their
JSON file).
"""
