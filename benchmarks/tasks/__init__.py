"""The work that methods are compared on."""
