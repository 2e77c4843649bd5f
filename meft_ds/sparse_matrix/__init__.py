# SPDX-License-Identifier: Apache-2.0
"""SMT, sparse matrix tuning (arXiv 2405.15525): only the tiles of the weights whose gradients are largest train.

A *tile* is a rectangle of a weight as it is stored, a *grid* is all tiles that a weight is cut into, and a *group* is
tiles of one matrix that are read, written and multiplied at once.

Files in reading order: config, discover (which weights), roles (where a weight may be cut), choice (score: tiles by
their gradients; choice: tiles and their file; select: which tiles), tiles (those of one matrix), unit (the wire
format), plan (what a run does), method (all of it in an engine), files (trained tiles, to be swapped).
"""
