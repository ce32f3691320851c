"""What silently breaks a policy, looked for: `vla-energy doctor`. Needs no torch to import."""
