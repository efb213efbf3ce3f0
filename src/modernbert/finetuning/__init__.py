"""Fine-tuning: a command and a function for each task, and the parts for loops of one's own."""
