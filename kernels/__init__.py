"""Triton twins of the stages' hot functions, one file an operation: same name, arguments and layout as the PyTorch function they stand for.

A stage asks for a twin through `find_twin` in 01_nvfp4.py: on a CUDA tensor by default, never with impl="torch". Importing this folder compiles
nothing. On a CPU the twins run, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts.
"""
