"""What every benchmark shares: taking turns, child processes, CPU time, summaries, tables."""
