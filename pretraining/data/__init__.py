"""Which scans, without which patients, and their voxels: the nnU-Net dataset, further folders, checks, reading."""
