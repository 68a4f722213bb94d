"""What is measured on pictures: rows, metrics, the seam, the drift."""
