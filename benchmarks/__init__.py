"""How fast Silo is, measured beside the best that others offer. Read ``docs/benchmarks/README.md`` first."""
