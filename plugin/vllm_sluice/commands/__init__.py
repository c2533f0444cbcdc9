"""What the `sluice` command does, one module a subcommand and what they share. Imports torch and vLLM only on need."""
