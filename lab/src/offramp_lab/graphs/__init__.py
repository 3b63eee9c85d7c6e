"""Early exits as CUDA graphs: a token is one launch of recorded kernels and one read.

On a GPU a small model's token takes as long as the CPU needs to launch its kernels one by one.
`GraphRuntime` records them over memory that stays where it is, and launches each recording at once.
"""
