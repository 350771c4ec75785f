"""These tests compare with TRL 0.28 and run where it is installed: make test-oracle."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_*.py"]
