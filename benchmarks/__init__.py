"""Speed and memory, measured beside the PyTorch peers in one run. Needs the `test` extra: pip install -e '.[test]'."""
