"""The model zoo: a small model of every family in timm and transformers, and what is checked on it."""
