"""One pretraining run: its configuration, model, engines, loop, checkpoints and metrics."""
