"""The NBD server beside nbdkit and qemu-nbd. Run it as ``python -m benchmarks.nbd``."""
