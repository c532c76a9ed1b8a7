"""Self-supervised pretraining of the encoder.

A scan passes through the rooms in this order, and a room imports only from rooms before it:

- `data`: which scans, without which patients, and their voxels.
- `pairs`: two views of a patch or slice, their keypoints, which keypoints match; batches.
- `objectives`: batch to embeddings to loss.
- `monitoring`: does it learn.
- `exchange`: weights from and for other tools.

The files beside them hold one run together. `config` (options), `task` (dataset and plans), `distributed` and `signals`
are used by all rooms; then `loop` (step and epoch), `checkpoint`, `prepare` (everything before the first step),
`recorder` (what is written), `run` (from start to checkpoint) and `cli`.
"""
