# SPDX-License-Identifier: Apache-2.0
"""MEFT, the sparse adapter (arXiv 2406.04984): a wide adapter beside each frozen FFN, of which a token uses few rows.

Files in reading order: config, forward (router: experts of rows; select: which keys a token uses; grouping: pairs by
expert; grouped, cpu and union: the function; recompute: what checkpointing repeats), rows (source: rows on one device;
host: rows on the host; compression: of their gradients), layer, discover, widths, attach and masks (into a model), unit
(the wire format), method (all of it in an engine), takeover (by the next engine), layout, base, files
and folder (on disk), extras (what an engine sees of adapters).
"""
