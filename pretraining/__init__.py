"""Self-supervised pretraining of the encoder. The files in the order in which an image passes through them.

- ``cli``, ``config``, ``task``, ``run``: the command, its options, the nnU-Net dataset and plans, one run from start to
  checkpoint.
- ``prepare``: everything before the first step. ``dataset``, ``patients``: which images, without which patients.
  ``raw_images``, ``raw_checks``, ``preprocess``: further folders. ``images``, ``checks``: reading. ``keypoint_cache``,
  ``descriptors``: keypoints, once per case.
- ``loader``: case -> ``pairs`` -> ``views``, ``splines``, ``render`` -> ``correspondences`` -> ``batch``.
- ``model``, ``heads``: batch -> embeddings. ``losses``, ``positives``, ``pairwise``, ``transport``: embeddings -> loss.
- ``loop``: step and epoch. ``distributed``, ``signals``, ``checkpoint``: several processes, interruption, resume.
- ``monitor``, ``metrics``, ``progress``, ``tracking``, ``logfile``: does it learn.
- ``interop``, ``sources``, ``nnssl``, ``export_cli``: weights of and for other tools.
"""
