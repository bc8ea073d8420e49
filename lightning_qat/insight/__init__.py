"""Where quantization costs accuracy: compared layer by layer, by sensitivity, by calibration."""
