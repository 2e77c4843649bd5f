# SPDX-License-Identifier: Apache-2.0
"""How units meet a model: which weights it has, how gradients leave it, how updates enter it.

Files: discover (which weights a method may work on), heads (output heads and PEFT's parameters), capture (gradients and
activations on their way out), weights (whole or partitioned parameters), gradient_checkpointing (frozen layers under
the reentrant kind), hooks (what a model carries for its engine).
"""
