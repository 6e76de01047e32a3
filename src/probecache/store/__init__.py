"""The files: what they are called, how they are written, committed and read back."""
