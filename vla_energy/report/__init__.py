"""What people look at after a run; needs matplotlib (extra `native`)."""
