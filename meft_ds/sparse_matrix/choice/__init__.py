# SPDX-License-Identifier: Apache-2.0
"""Which tiles train: scores, the choice within the budget, and its file."""
