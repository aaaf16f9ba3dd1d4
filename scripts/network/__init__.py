"""The paper's networks, losses and fields (Hu et al. 2018, §2). Imports nothing of `scripts`."""
