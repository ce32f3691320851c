"""Inside another project's code base, without a change of its models: the plugin, and the patch tool for its lines."""
