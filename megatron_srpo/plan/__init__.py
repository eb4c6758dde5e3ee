"""What will a run take?   config, number and kind of GPUs -> memory by phase, seconds of a step"""
