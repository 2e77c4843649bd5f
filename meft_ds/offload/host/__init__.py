# SPDX-License-Identifier: Apache-2.0
"""What the host side of the pipeline is made of.

Files: cgroup (limits of a container), memory (what is free, the check before anything is allocated), page_locked
(memory that an accelerator copies from), shared_memory (one store for a node's ranks), transfer (copies between device
and host, counted), adam (AdamW state of tensors and rows).
"""
