"""One small file per analysis; `python -m experiments.figure` finds them by `_target_`."""
