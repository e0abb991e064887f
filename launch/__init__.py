"""Jobs and launchers that train with Conda: the outermost layer of the package.

`pretrain` is the job; `compare` runs several of them; `benchmark` times a step; `plan` predicts
what a model costs. `job`, `data`, `cluster` and `tools` hold their parts.
"""
