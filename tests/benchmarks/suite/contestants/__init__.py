"""One module per trainer. Each has `train(spec, gate)`, which trains as a user of that trainer would write it."""
