"""From preprocessed scans to batches: keypoints once per case, two views of a patch or slice, which keypoints match."""
