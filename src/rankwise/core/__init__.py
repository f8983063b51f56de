"""What all methods stand on: statistics, choices, surgery, reports."""
