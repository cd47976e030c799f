"""Accuracy, intervals, pairs, calibration, Table 1."""
