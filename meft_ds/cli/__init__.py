# SPDX-License-Identifier: Apache-2.0
"""The command `meft-ds`. It needs neither a network nor a GPU, and nothing else of this package imports it.

Files: main (the commands and exit codes), schema (JSON schema of the block).
"""
