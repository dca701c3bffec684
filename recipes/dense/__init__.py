"""Object detection and semantic segmentation, by MMDetection and MMSegmentation."""
