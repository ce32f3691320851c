"""Fine-tuning with an energy head on the native backbone; needs the `native` and `data` extras."""
