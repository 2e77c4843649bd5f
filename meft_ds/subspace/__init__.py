# SPDX-License-Identifier: Apache-2.0
"""LSP, learned subspace projectors (arXiv 2406.10181): a matrix trains through S = P^T G Q, d x d instead of m x n.

Files in reading order: config, discover (which matrices), matrix (one and its projectors), unit (the wire format),
calibrate (when projectors change), fit (their values), method (all of it in an engine). P, Q: `meft_ds.ops.projector`.
"""
