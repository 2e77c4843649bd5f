# SPDX-License-Identifier: Apache-2.0
"""When the stages of a step run, and what it costs.

Files: config (the "schedule" key), window (one accumulation window), lanes (worker threads), eager (order and mode from
measured times), timing (spans of work and waiting), trace (a file of them), host_threads (threads and CPUs of the host
lane).
"""
