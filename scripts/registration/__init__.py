"""One pair: initial transform, working grid, refinement, and what is written of it. May import `data`, `network`."""
