"""Moving a disk from one process to another: how fast, how long the guest stands still, how many bytes."""
