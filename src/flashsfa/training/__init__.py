"""Training with Sparse Feature Attention, on transformers' Trainer and accelerate.

`recipe` reads the YAML of a run; `data`, `needle` and `models` make what it names; `attention` and `baselines` are the forms
of attention that can be trained; `run` is the Trainer and the run's directory; `pretrain` and `distill` tie them together;
`support` looks at what a model learned; `compare` puts runs beside one another. `flashsfa train` is the command line of all this.
"""
