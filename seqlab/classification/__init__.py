"""Labelled sequences: metrics, baselines and the dataset they come from. The one home of scikit-learn."""
