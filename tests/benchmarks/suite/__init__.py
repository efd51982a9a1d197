"""dtrain and its peers side by side: `python -m tests.benchmarks NAME...` (see tests/benchmarks/README.md)."""
