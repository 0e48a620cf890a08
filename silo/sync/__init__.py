"""Below the volumes, the object store: keeping a whole cut of a group there at all times, and getting it back.

Three layers, lowest first. *Stores* speak to one kind of object store each, behind the port
`silo.abc.ObjectStore`: ``memory_store``, ``file_store``, ``s3_store`` and ``aiobotocore_store``, opened by URL
through ``store_url`` and held to one contract by `silo.testing.check_store`; ``probe`` finds out at open
whether a store is fit to be written to. *Formats* are pure: ``layout``, ``codec``, ``segment``, ``manifest``.
*Machines and drivers* make cuts, commit them through the register, and read chunks back.

Nothing here imports exports, devices, p2p or hooks.
"""
