"""`internlm selftest`: whether this machine's devices compute what they should, in one table.

Meant for the day an NPU is there; runs on a CPU and on GPUs as well.
"""
