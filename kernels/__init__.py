"""The GPU backend in Triton. Importing it needs triton; ``fastopt.dispatch`` does so on demand."""
