"""Programs on several hosts of a lab, asked over the wall clock: ours, and llama.cpp over RPC. No torch.

A lab is whatever is `places.Places`: network namespaces of this machine, with links whose delay is set.
"""
