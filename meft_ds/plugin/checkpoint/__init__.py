# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and exports: what an engine saves and loads.

Files: overrides (the engine's methods), transaction (a save happens on all ranks or on none), state (units' state and
the manifest), ds_files (DeepSpeed's own file, mapped while it is read), recovery (for `zero_to_fp32.py`), export
(adapters, tiles, plain weights), folder (what a folder with an adapter says).
"""
