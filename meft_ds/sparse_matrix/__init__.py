# SPDX-License-Identifier: Apache-2.0
"""SMT, sparse matrix tuning (arXiv 2405.15525): only the tiles of the weights whose gradients are largest train.

Files in reading order: config, discover (which weights), segments (where a weight may be cut), score (tiles by their
gradients), choice (tiles and their file), select (which tiles), blocks (the tiles of one matrix), linear (the delta
form's layer), unit (the wire format), method (all of it in an engine), files (tiles to swap), picture (where they are).
"""
