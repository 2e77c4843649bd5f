# SPDX-License-Identifier: Apache-2.0
"""The command `meft-ds`. It needs neither a network nor a GPU, and nothing else of this package imports it.

Files: main (the commands and exit codes), schema (JSON schema of the block), checkpoint (read without an engine),
export (plain weights from it), method_files (an adapter or tiles from it), stream (safetensors in bounded memory),
verify (do both compute the same?), tiles (files of tiles and model folders), doctor (the
machine and the environment), config_checks (a ds_config as the engine judges it), report (lines of doctor).
"""
