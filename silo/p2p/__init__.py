"""A group moves from one host to another: what the two hosts say, decide and do.

Lowest first. *Bytes*: ``wire`` frames, ``messages`` names what they mean, ``chunksets`` packs sets of chunks,
``records`` what either side keeps on disk. *Machines*, pure as well: ``conversation`` says which frame may
follow which, ``handover`` who may run the guest, ``precopy`` what is sent next. *Drivers*: ``transport`` and
``tls_transport`` carry bytes and ``channel`` frames, ``source`` and ``target`` drive one side each, ``reception``
listens, ``peer_source`` answers the volume's demand for a chunk that only the source has.

Nothing here imports devices, exports, sync or hooks. What a migration needs of them (the register, a hold
on commits, durable records, the workload) it asks for in ``ports``, and the host plugs it in.
"""
