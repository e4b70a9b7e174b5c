"""The scoreboard: what the suite costs against what people use, as ratios measured side by side."""
