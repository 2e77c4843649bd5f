# SPDX-License-Identifier: Apache-2.0
"""SMT, sparse matrix tuning (arXiv 2405.15525): only the tiles of the weights whose gradients are largest train.

Files in reading order: config, discover (which weights), segments (where a weight may be cut), choice (tiles and their
file), select (which tiles), picture (where they are).
"""
