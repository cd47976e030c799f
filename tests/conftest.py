"""Shared fixtures: tiny random models of the real architecture, and nothing that calls out."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
