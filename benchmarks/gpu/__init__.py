"""The parts of gpu_report.py: what is measured on a card, and how."""
