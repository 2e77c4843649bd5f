# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and exports: what an engine saves and loads."""
