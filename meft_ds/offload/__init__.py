# SPDX-License-Identifier: Apache-2.0
"""The pipeline that moves sparse slices of gradients down, updates them on the host, and moves the result up."""
