"""What runs: one room a question, in each the plain PyTorch form beside the fused ones.

`transform` changes the coordinates of queries and keys, `select` codes rows and scatters codes back, `prefill` attends with many queries,
`decode` with a few over cached codes. `plan` says which form runs and why.
"""
