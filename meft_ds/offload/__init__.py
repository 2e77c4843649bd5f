# SPDX-License-Identifier: Apache-2.0
"""The pipeline: it moves sparse slices of gradients to the host, updates them there, and moves the result back.

It knows no method. A method gives it *units*: what one layer moves in one *wire format*. Once per *window* (the
micro-batches of one optimizer step) the pipeline drives every unit through seven stages:

    collect     training thread   take the window's gradient sum as the *payload*
    reduce      down lane         sum it over ranks, keep the part that this rank owns
    send        down lane         copy it into page-locked host memory
    sq_norm     host lane         its sum of squares, for clipping and for the *verdict*: update, or skip
    host_step   host lane         AdamW on the owned *masters* and moments
    fetch       up lane           copy the *reply* to the device, gather other ranks' parts
    apply       training thread   make the reply what the next forward sees

A *lane* is one worker thread. Stages of different units overlap; those of one unit never do. An *update gate* makes a
forward wait for the pending update of what it reads. Words in stars are in the glossary of
docs/explanation/architecture.md.

Files in reading order: unit (the contract), flat_unit (units whose payload is one vector), master_unit (those with
float32 masters), dense_unit (tensors that train whole), method (what an engine asks of a method), pipeline (a step),
updates (from the host into the weights), broken_windows (windows without a step), update_gates and waiting (nobody
reads a weight under update), ranks (who owns what). Rooms: schedule (when stages run), host (memory, copies, AdamW),
model (how gradients leave a model).
"""
