# SPDX-License-Identifier: Apache-2.0
"""LSP, learned subspace projectors (arXiv 2406.10181): a matrix trains through S = P^T G Q, d x d instead of m x n.

Files in reading order: config, discover (which matrices), linear (where S is computed), unit (the wire format), refit
(when projectors change), fit (their values), method (into a model and an engine). P and Q: `meft_ds.ops.projector`.
"""
