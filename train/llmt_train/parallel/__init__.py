"""One model on many devices: who holds which part of it, and who reads which rows."""
