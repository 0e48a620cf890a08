"""What stands above a volume: the ways in which a guest reaches it."""
