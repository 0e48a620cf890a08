"""Storing a disk: our syncer beside the bare store client that it uses."""
