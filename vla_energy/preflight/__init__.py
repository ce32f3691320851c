"""Before deployment: what a checkpoint's modes would do on held-out data, and whether to use one."""
