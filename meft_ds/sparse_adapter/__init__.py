# SPDX-License-Identifier: Apache-2.0
"""MEFT, the sparse adapter (arXiv 2406.04984): a wide adapter beside each frozen FFN, of which a token uses few rows.

Files in reading order: config, router, rows (where rows live), select (which rows), plan (tiles), compute (grouped) and
union (oracle), balance, replay (checkpointing), module, discover and attach (into a model), files (save and reload).
"""
