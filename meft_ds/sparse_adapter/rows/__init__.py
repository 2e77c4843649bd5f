# SPDX-License-Identifier: Apache-2.0
"""Where the rows of an adapter live, and how their gradients travel."""
