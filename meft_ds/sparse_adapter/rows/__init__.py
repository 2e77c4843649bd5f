# SPDX-License-Identifier: Apache-2.0
"""Where the rows of an adapter live, and how their gradients travel.

Files: source (what a layer asks of its rows; rows on one device), host (rows on the host, a window of them on the
device), compression (row gradients through a sparse projector).
"""
