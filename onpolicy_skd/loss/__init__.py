"""The distillation loss: typed inputs, closed forms, chunked autograd function."""
