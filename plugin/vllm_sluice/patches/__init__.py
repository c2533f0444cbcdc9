"""Changes of the forward pass that can be switched: one file a kind, and the installer."""
