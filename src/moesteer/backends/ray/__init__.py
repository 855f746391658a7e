"""Several workers on one machine or many, each with a model of its own, behind one backend (docs/scaling.md).

cluster.py   a cluster of Ray for the length of a block, and what each worker gets of it
worker.py    what runs in a worker: one model of either backend, and the questions it answers
pool.py      hands parts to workers, in order; does again what a lost worker had
model.py     the backend: splits a question into parts as the local run splits it into batches
loading.py   starts all of it, and proves that every worker has the same model
wire.py      what travels: dicts, lists, text, bytes, numbers and numpy arrays

Why actors of Ray itself and not a pool of Ray Data: docs/scaling.md, "How the work is split".
"""
