"""Names of version 0.1.0 that saved configs and installed entry points still use. New code imports hpo_plugin.verl."""
