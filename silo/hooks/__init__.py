"""What Silo asks of whatever uses the disks: stop, say what you hold, run on over there.

``runner`` calls the hooks of a `silo.Workload` with deadlines, one at a time, for a migration; ``calls`` is how
a single hook is called, awaited or given up. Workloads that need no class of their own: ``command`` runs a shell
command per hook, by way of ``shell``; ``inprocess`` wraps functions, and stands in where there is no workload.
``observers`` asks those who watch a migration whether they object.

Nothing here knows of migrations, stores or exports: the host hands a runner to the migration as its
``silo.p2p.ports.Guest``, and the observers as its ``Consent``.
"""
