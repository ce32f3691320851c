"""Inside another project's code base, without a change of its models: the plugin, and the tool that adds our lines to it."""
