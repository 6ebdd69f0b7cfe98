"""Side by side with peers: the same network, the same calibration data, one run. Losses are written down like wins."""
