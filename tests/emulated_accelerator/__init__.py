# SPDX-License-Identifier: Apache-2.0
"""An accelerator that is emulated on the CPU: its memory is not the host's, and its streams run asynchronously.

Import it in a process of its own: torch has one accelerator per process from then on, `torch.emulated`.
`README.md` here tells how it works and what it finds.
"""
