"""Below the volumes, the object store: keeping a whole cut of a group there at all times, and getting it back.

*Stores* speak to one kind of object store each, behind the port `silo.abc.ObjectStore`: ``memory_store``,
``file_store``, ``s3_store`` and ``aiobotocore_store``, opened by URL through ``store_url`` and held to one contract by
`silo.testing.check_store`; ``probe`` finds out at open whether a store is fit to be written to.

*Formats* are pure: ``layout`` (keys), ``codec`` (a chunk), ``segment``, ``mappage`` (pages and root of the map),
``head``. So are the decisions: ``claim`` (who may replace which head), ``planner``, ``runs``.

*Writing*: ``register`` claims and commits. ``syncer`` keeps the pace and takes cuts; each goes through ``committer``,
which has it uploaded (``uploader``, ``sender``, listed in ``pending``) and now and then writes a checkpoint of the map
(``checkpointer``).

*Reading*: ``manifest`` is a generation with its map, which ``committed`` and ``slots`` hold in memory;
``reader`` fetches; ``store_source`` gives single chunks to a volume, ``restore`` whole volumes to devices.

Nothing here imports exports, devices, p2p or hooks.
"""
