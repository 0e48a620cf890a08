"""``silo demo``: the main job on one machine, with a guest that checks every byte it reads.

Three kinds of processes: two daemons that stand for two hosts, and a guest. The guest knows what every block
of its disk must hold, so it notices a wrong byte at once; the play kills the first host the moment that host
says that it may go; and in the end the whole disk is compared with the model and checked by ``e2fsck``.
"""
