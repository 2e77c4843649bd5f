# SPDX-License-Identifier: Apache-2.0
"""The function of the adapter, row by row of the batch: which experts, which keys, and their sum of values."""
