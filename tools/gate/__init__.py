"""The parts of `tools/gpu_gate.py`: what is checked, what is timed, what is written down."""
