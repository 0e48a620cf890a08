"""For tests of programs that embed Silo, and of implementations of its ports; Silo's own tests use the same.

`silo.testing.loop` runs scenarios on virtual time with seeded interleavings. The ``check_*`` functions hold
an implementation of a port to its contract. Nothing here depends on a test framework.
"""
