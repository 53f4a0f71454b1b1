"""What training on many GPUs would take: formulas for memory, bytes and time, and runs that count the bytes."""
