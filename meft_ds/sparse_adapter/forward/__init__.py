# SPDX-License-Identifier: Apache-2.0
"""The adapter's function: which experts, which keys, and the sum of their values.

Files: router (experts, logits, load balance), select (which keys a token uses), grouping (pairs of token and expert, by
expert), then the function in three forms: grouped (batched GEMMs), cpu (selected entries), union (every token against
all rows, the oracle); recompute (a recomputed forward selects what the first one did).
"""
